"""Everything a run needs, built, resumed and checked before its first step."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm import tqdm

from duet.configs.errors import UserError
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.model import load_pipeline, pick_device
from duet.inference.prompt_check import check_prompts
from duet.rewards.registry import load_rewards
from duet.train import gate
from duet.train.environment import require_own_settings
from duet.train.geometry import Geometry, geometry
from duet.train.policy import Policy
from duet.train.prompts import untold_text
from duet.train.recompute import recompute_blocks
from duet.train.resume import Start, find_start, read_inputs
from duet.train.scoring import Scorer
from duet.train.signals import Signals
from duet.train.stages import STAGES, Stage
from duet.train.together import from_main
from duet.train.trackers import prepare_trackers, tracker_arguments
from duet.train.tuning import tuning_of


@dataclass(frozen=True)
class Run:
    """Everything a step needs."""

    config: RunConfig
    accelerator: Accelerator
    geometry: Geometry
    stage: Stage
    policy: Policy
    scorer: Scorer
    weights: torch.Tensor  # [R], of the trained rewards
    rows: Sequence[Row]
    start: Start
    signals: Signals = field(default_factory=Signals)

    @property
    def shows(self) -> bool:
        """Progress bars come from one process a machine, and go to a terminal alone."""
        return self.accelerator.is_local_main_process and sys.stderr.isatty()


def prepare(config: RunConfig) -> Run:
    """Build the run, resume it if asked, and pass the gates that need no rollout.

    Raises UserError for anything the user can mend.
    """
    config.require_trainable()
    accelerator = _accelerator(config)
    rows, held_out = (
        rows_of(config, part, accelerator.is_local_main_process) for part in ("train", "eval")
    )
    untold = untold_text(rows)
    if untold and accelerator.is_main_process and any(r.name == "ocr" for r in config.rewards):
        tqdm.write(f"duet: {untold}")
    divided = geometry(config, accelerator.num_processes)
    processes = accelerator.num_processes
    start = from_main(accelerator, lambda: find_start(config, processes, read_inputs(config, rows)))
    scorer = Scorer(load_rewards(config.rewards), load_rewards(config.watch.rewards))
    set_seed(config.seed)
    model = config.model
    pipeline = load_pipeline(model.path, model.dtype, str(accelerator.device), model.offload)
    engine = Engine.of(pipeline, config, accelerator.is_local_main_process)
    stage = STAGES[config.stage](engine, config)
    for each in (rows, held_out):
        check_prompts(pipeline, each, stage.size, accelerator.is_local_main_process)
    base = start.inputs.model[stage.part.component]
    module = stage.part.module(pipeline)
    engine.placement.bring(stage.part.component)
    if config.optim.gradient_checkpointing:
        recompute_blocks(module, stage.part.block)
    tuning = tuning_of(config, base)
    policy = Policy(accelerator, module, tuning, config.optim, divided.updates, config.average)
    if start.checkpoint:
        policy.load(start.checkpoint)
    gate.check_schedule(engine, stage.size)
    gate.check_reference(engine, rows[0].prompt, stage.size, config.arithmetic.precision)
    if accelerator.is_main_process:
        accelerator.init_trackers("duet", init_kwargs=tracker_arguments(config, start))
    weights = torch.tensor([r.weight for r in config.rewards])
    return Run(config, accelerator, divided, stage, policy, scorer, weights, rows, start)


# torch's new name for it means something else, and accelerate passes on the old one alone
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def _accelerator(config: RunConfig) -> Accelerator:
    require_own_settings(config)
    on_cpu = pick_device(config.model.device).type == "cpu"
    if on_cpu and config.train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision = 'fp16' needs a GPU: on a CPU take 'bf16' or 'no'")
    return Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        log_with=prepare_trackers(config) or None,
        project_dir=config.output_dir,
        cpu=on_cpu,
        step_scheduler_with_optimizer=False,
        # glyph lengths differ, so processes may run unequal numbers of forwards: none of them
        # may wait in one for the others' buffers, which no forward changes
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
