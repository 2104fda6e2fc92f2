"""Everything a run needs, built, resumed and checked before its first step."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from duet.configs.errors import UserError, require_writable
from duet.configs.rows import load_rows
from duet.configs.schema import RunConfig
from duet.inference.adapters import AdapterInfo
from duet.inference.engine import Engine
from duet.inference.model import load_pipeline, pick_device
from duet.rewards.registry import load_rewards
from duet.train import gate
from duet.train.checkpoint import Start, find_start
from duet.train.environment import require_own_settings
from duet.train.geometry import Geometry, geometry
from duet.train.policy import Policy
from duet.train.scoring import Scorer
from duet.train.signals import Signals
from duet.train.stages import STAGES, Stage
from duet.train.trackers import prepare_trackers, tracker_arguments
from duet.train.tuning import Lora


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
    rows: list[dict]
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
    rows = load_rows(config.data.train)
    load_rows(config.data.eval)
    accelerator = _accelerator(config)
    divided = geometry(config, accelerator.num_processes)
    start = find_start(config, accelerator.num_processes)
    require_writable("output_dir", Path(config.output_dir))
    scorer = Scorer(load_rewards(config.rewards), load_rewards(config.watch.rewards))
    set_seed(config.seed)
    pipeline = load_pipeline(config.model.path, config.model.dtype, str(accelerator.device))
    engine = Engine.of(pipeline, config, accelerator.is_local_main_process)
    stage = STAGES[config.stage](engine, config)
    gate.check_schedule(engine, stage.size)
    gate.check_reference(engine, rows[0]["prompt"], stage.size, config.arithmetic.precision)
    tuning = Lora(config.lora, AdapterInfo(config.stage, config.model.path, config.arithmetic))
    module = stage.part.module(pipeline)
    policy = Policy(accelerator, module, tuning, config.optim, divided.updates)
    if start.checkpoint:
        policy.load(start.checkpoint)
    if accelerator.is_main_process:
        accelerator.init_trackers("duet", init_kwargs=tracker_arguments(config, start))
    weights = torch.tensor([r.weight for r in config.rewards])
    return Run(config, accelerator, divided, stage, policy, scorer, weights, rows, start)


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
