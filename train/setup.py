"""Everything a run needs, built, resumed and checked before its first step."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import GlmImagePipeline

from duet.configs.errors import UserError, tell
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.configs.turns import rollouts_of, trained_rewards, turns
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline, model_folder, pick_device
from duet.inference.outline import read_outline
from duet.inference.parts import AR, DECODER
from duet.inference.prompt_check import check_prompts
from duet.train import gate
from duet.train.checkpoint import load_checkpoint
from duet.train.environment import require_own_settings
from duet.train.geometry import geometry
from duet.train.memory import require_fit
from duet.train.policy import Policy
from duet.train.prior_cache import PriorCache, check_cache
from duet.train.prior_stamp import make_stamp
from duet.train.prior_tokens import require_references
from duet.train.prompts import untold_text
from duet.train.recompute import recompute_blocks
from duet.train.resume import Start, find_start, read_inputs
from duet.train.run import Run, Training
from duet.train.scoring import load_scorers
from duet.train.signals import Signals
from duet.train.stages import STAGES, Stage
from duet.train.state import leave_weights_out
from duet.train.together import from_main
from duet.train.trackers import prepare_trackers, tracker_arguments
from duet.train.tuning import tuning_of


def prepare(config: RunConfig) -> Training:
    """Build the run, resume it if asked, and pass the gates that need no rollout.

    Raises UserError for anything the user can mend.
    """
    parts = turns(config)
    for part in parts.values():
        part.require_trainable()
    accelerator = _accelerator(config)
    processes, show = accelerator.num_processes, accelerator.is_local_main_process
    rows, held_out = (rows_of(config, part, show) for part in ("train", "eval"))
    _tell_untold_text(rows, config, accelerator)
    divided = {
        name: geometry(part, processes, rollouts_of(config, name)) for name, part in parts.items()
    }
    for part in parts.values():
        require_references(part, rows)
    start = from_main(accelerator, lambda: find_start(config, processes, read_inputs(config, rows)))
    if accelerator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
        for part in parts.values():
            require_fit(part, model_folder(config.model.path), processes, memory)
    outline = read_outline(config.model.path)
    size = Size.of(config.sampling)
    for each in (rows, held_out):
        check_prompts(outline, each, size, show)
    unread = _unread(parts, rows, start, accelerator)
    scorers = load_scorers(parts)
    set_seed(config.seed)
    pipeline = _pipeline(config, accelerator, unread)
    stages = {
        name: STAGES[name](Engine.of(pipeline, part, show), part) for name, part in parts.items()
    }
    leave_weights_out(accelerator)
    signals = Signals()
    runs = {
        name: Run(
            part,
            accelerator,
            divided[name],
            stages[name],
            _policy(part, stages[name], accelerator, start, divided[name].updates),
            scorers[name],
            torch.tensor([r.weight for r in part.rewards]),
            rows,
            signals,
        )
        for name, part in parts.items()
    }
    training = Training(config, accelerator, runs, start, signals)
    if start.checkpoint:
        load_checkpoint(training.policies, start.checkpoint)
    first = next(iter(stages.values()))  # what is judged is what trains
    gate.check_schedule(first.engine, size)
    gate.check_reference(first.engine, rows[0].prompt, size, config.arithmetic.precision)
    edit = next((row for row in rows if row.sources), None)
    if edit is not None:
        gate.check_edit(first.engine, edit.prompt, edit.sources, size, config.arithmetic.precision)
    if accelerator.is_main_process:
        accelerator.init_trackers("duet", init_kwargs=tracker_arguments(config, start))
    return training


def _tell_untold_text(rows: Sequence[Row], config: RunConfig, accelerator: Accelerator) -> None:
    untold = untold_text(rows)
    read = any(reward.name == "ocr" for reward in trained_rewards(config))
    if untold and read and accelerator.is_main_process:
        tell(untold)


def _unread(
    parts: Mapping[str, RunConfig], rows: Sequence[Row], start: Start, accelerator: Accelerator
) -> list[str]:
    """The AR, where a cache gives the decoder's priors; that it is this run's is checked here."""
    decoder = parts.get(DECODER.name)
    if decoder is None or PriorCache.of(decoder) is None:
        return []
    ar = start.inputs.model[AR.component]
    from_main(accelerator, lambda: check_cache(decoder, make_stamp(decoder, rows, ar), rows))
    return [AR.component]


def _pipeline(
    config: RunConfig, accelerator: Accelerator, unread: Sequence[str]
) -> GlmImagePipeline:
    model = config.model
    return load_pipeline(model.path, model.dtype, str(accelerator.device), model.offload, unread)


def _policy(
    config: RunConfig, stage: Stage, accelerator: Accelerator, start: Start, updates: int
) -> Policy:
    part, engine = stage.part, stage.engine
    tuning = tuning_of(config, start.inputs.model[part.component])
    module = part.module(engine.pipeline)
    engine.placement.bring(part.component)
    if config.optim.gradient_checkpointing:
        recompute_blocks(module, part.block)
    return Policy(accelerator, module, tuning, config.optim, updates, config.average)


# torch's new name for it means something else, and accelerate passes on the old one alone
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def _accelerator(config: RunConfig) -> Accelerator:
    require_own_settings(config)
    on_cpu = pick_device(config.model.device).type == "cpu"
    if on_cpu and config.train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision = 'fp16' needs a GPU: on a CPU take 'bf16' or 'no'")
    return Accelerator(
        mixed_precision=config.train.mixed_precision,
        log_with=prepare_trackers(config) or None,
        project_dir=config.output_dir,
        cpu=on_cpu,
        step_scheduler_with_optimizer=False,
        # glyph lengths differ, so processes may run unequal numbers of forwards: none of them
        # may wait in one for the others' buffers, which no forward changes
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
