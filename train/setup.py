"""Everything a run needs, built, resumed and checked before its first step."""

import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import GlmImagePipeline
from torch.nn import Module

from duet.configs.errors import UserError, tell
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.configs.turns import rollouts_of, trained_rewards, turns
from duet.inference.empty import build_empty, weights_of
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.lost import wait_at_most
from duet.inference.model import load_pipeline, model_folder, pick_device
from duet.inference.outline import read_outline
from duet.inference.parts import AR, DECODER, PARTS
from duet.inference.prompt_check import check_prompts
from duet.inference.together import from_main
from duet.train import gate
from duet.train.checkpoint import load_checkpoint
from duet.train.engines import chosen_sharding
from duet.train.environment import engine, processes_alone, require_own_settings
from duet.train.fitting import require_fit
from duet.train.geometry import geometry
from duet.train.given import Given, given, load_given
from duet.train.held_out import HeldOut, evaluation_id
from duet.train.policy import Policy
from duet.train.prior_cache import PriorCache, check_cache
from duet.train.prior_stamp import make_stamp
from duet.train.prior_tokens import require_references
from duet.train.prompts import untold_text
from duet.train.recompute import recompute_blocks
from duet.train.resume import Start, find_start, read_inputs
from duet.train.run import Run, Training
from duet.train.scoring import load_scorers, require_whole_groups
from duet.train.signals import Signals
from duet.train.stages import STAGES, Stage
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
    begun = from_main(accelerator, lambda: given(config))
    start = from_main(
        accelerator, lambda: find_start(config, processes, read_inputs(config, rows, begun))
    )
    if accelerator.device.type == "cuda":
        memory = torch.cuda.get_device_properties(accelerator.device).total_memory
        for part in parts.values():
            beside = [other for other in parts.values() if other is not part]
            sizes = model_folder(config.model.path)
            require_fit(part, sizes, processes, memory, beside, engine())
    outline = read_outline(config.model.path)
    size = Size.of(config.sampling)
    for each in (rows, held_out):
        check_prompts(outline, each, size, show)
    unread = _unread(parts, rows, start, begun, accelerator)
    loaded = load_scorers(config, parts)
    for name, part in parts.items():
        if divided[name].spread:
            require_whole_groups(loaded.scorers[name], part, processes)
    set_seed(config.seed)
    empty = _empty(parts)
    pipeline = _pipeline(config, accelerator, unread, empty)
    frozen = [p.name for p in PARTS.values() if p.name not in parts and p.component not in unread]
    load_given(pipeline, begun, frozen)
    stages = {
        name: STAGES[name](Engine.of(pipeline, part, show), part) for name, part in parts.items()
    }
    if not chosen_sharding().movable:  # whatever `model.offload` moves
        for stage in stages.values():
            stage.engine.placement.fixed |= {PARTS[name].component for name in parts}
    policies = {
        name: _policy(
            part,
            stages[name],
            accelerator,
            start,
            begun.get(name),
            divided[name].updates,
            name in empty,
        )
        for name, part in parts.items()
    }
    wait_at_most(config.train.ddp_timeout)
    signals = Signals()
    runs = {
        name: Run(
            part,
            accelerator,
            divided[name],
            stages[name],
            policies[name],
            policies,
            loaded.scorers[name],
            torch.tensor([r.weight for r in part.rewards]),
            rows,
            signals,
        )
        for name, part in parts.items()
    }
    judged = HeldOut(held_out, loaded.judges, evaluation_id(config, held_out))
    training = Training(config, accelerator, runs, start, signals, judged)
    if start.checkpoint:
        load_checkpoint(policies, start.checkpoint)
    first = next(iter(runs.values()))  # what is judged is what trains
    gate.check_schedule(first.stage.engine, size)
    with first.sampling():
        _check_pictures(first.stage.engine, rows, size, config.arithmetic.precision)
    if accelerator.is_main_process:
        accelerator.init_trackers("duet", init_kwargs=tracker_arguments(config, start))
    return training


def _check_pictures(engine: Engine, rows: Sequence[Row], size: Size, precision: str) -> None:
    gate.check_reference(engine, rows[0].prompt, size, precision)
    edit = next((row for row in rows if row.sources), None)
    if edit is not None:
        gate.check_edit(engine, edit.prompt, edit.sources, size, precision)


def _tell_untold_text(rows: Sequence[Row], config: RunConfig, accelerator: Accelerator) -> None:
    untold = untold_text(rows)
    read = any(reward.name == "ocr" for reward in trained_rewards(config))
    if untold and read and accelerator.is_main_process:
        tell(untold)


def _unread(
    parts: Mapping[str, RunConfig],
    rows: Sequence[Row],
    start: Start,
    begun: Mapping[str, Given],
    accelerator: Accelerator,
) -> list[str]:
    """The AR, where a cache gives the decoder's priors and no held-out prompt asks for others;
    that the cache is this run's is checked here."""
    decoder = parts.get(DECODER.name)
    if decoder is None or PriorCache.of(decoder) is None:
        return []
    ar, its = start.inputs.model[AR.component], begun.get(AR.name)
    from_main(accelerator, lambda: check_cache(decoder, make_stamp(decoder, rows, ar, its), rows))
    return [AR.component] if decoder.train.eval_steps is None else []


def _empty(parts: Mapping[str, RunConfig]) -> dict[str, Module]:
    """Parts that are built without weights, since no process is to hold all of them."""
    made = {}
    for name, config in parts.items():
        container = chosen_sharding().container()
        if config.tuning == "full" and container is not None:
            made[name] = build_empty(config.model.path, PARTS[name], container)
    return made


def _pipeline(
    config: RunConfig,
    accelerator: Accelerator,
    unread: Sequence[str],
    empty: Mapping[str, Module],
) -> GlmImagePipeline:
    model = config.model
    made = {PARTS[name].component: module for name, module in empty.items()}
    device, left_out = str(accelerator.device), [*unread, *made]
    pipeline = load_pipeline(model.path, model.dtype, device, model.offload, left_out)
    for component, module in made.items():
        setattr(pipeline, component, module)
    return pipeline


def _policy(
    config: RunConfig,
    stage: Stage,
    accelerator: Accelerator,
    start: Start,
    begun: Given | None,
    updates: int,
    empty: bool,
) -> Policy:
    part, sampler = stage.part, stage.engine
    source, own = None, begun and begun.folder
    if empty:
        source, own = own or weights_of(config.model.path, part), None
    tuning = tuning_of(config, start.inputs.model[part.component], own)
    module = part.module(sampler.pipeline)
    sampler.placement.bring(part.component)
    if config.optim.gradient_checkpointing:
        recompute_blocks(module, part.block)
    return Policy(accelerator, module, tuning, config.optim, updates, config.average, source)


# torch's new name for it means something else, and accelerate passes on the old one alone
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


def _accelerator(config: RunConfig) -> Accelerator:
    require_own_settings(os.environ, config)
    on_cpu = pick_device(config.model.device).type == "cpu"
    if on_cpu and config.train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision = 'fp16' needs a GPU: on a CPU take 'bf16' or 'no'")
    with processes_alone():
        return Accelerator(
            mixed_precision=config.train.mixed_precision,
            log_with=prepare_trackers(config) or None,
            project_dir=config.output_dir,
            cpu=on_cpu,
            step_scheduler_with_optimizer=False,
            # glyph lengths and sources differ, so processes may run unequal numbers of forwards:
            # none may wait in one for the others' buffers, which no forward changes
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
