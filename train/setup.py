"""Everything a run needs, built, resumed and checked before its first step."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import GlmImagePipeline
from torch.nn import Module

from duet.configs.errors import UserError, tell
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.configs.turns import each_beside_others, rollouts_of, trained_rewards, turns
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
from duet.train.environment import processes_alone, require_own_settings, sharding_engine
from duet.train.fitting import Deployment, require_fit
from duet.train.geometry import Geometry, geometry
from duet.train.given import Given, given, load_given
from duet.train.held_out import HeldOut, evaluation_id
from duet.train.kinds import Datasets, Kinds
from duet.train.policy import Policy
from duet.train.prior_cache import PriorCache, check_cache
from duet.train.prior_stamp import make_stamp
from duet.train.prior_tokens import require_references
from duet.train.prompts import untold_text
from duet.train.recompute import recompute_blocks
from duet.train.resume import Start, find_start, read_inputs
from duet.train.run import Run, Training
from duet.train.scoring import Loaded, load_scorers, require_whole_groups
from duet.train.signals import Signals
from duet.train.stages import STAGES, Stage
from duet.train.trackers import prepare_trackers, tracker_arguments
from duet.train.tuning import tuning_of


@dataclass(frozen=True)
class _Asked:
    """What is known of a run before a weight is read."""

    config: RunConfig
    parts: Mapping[str, RunConfig]
    accelerator: Accelerator
    rows: Sequence[Row]
    held_out: Sequence[Row]
    divided: Mapping[str, Geometry]  # by part
    begun: Mapping[str, Given]
    start: Start

    @property
    def shows(self) -> bool:
        return self.accelerator.is_local_main_process


def prepare(config: RunConfig) -> Training:
    """Build the run, resume it if asked, and pass the gates that need no rollout.

    Raises UserError for anything the user can mend.
    """
    asked = _ask(config)
    _require_fit(asked)
    outline, size = read_outline(config.model.path), Size.of(config.sampling)
    for each in (asked.rows, asked.held_out):
        check_prompts(outline, each, size, asked.shows)
    unread = _unread(asked)
    loaded = _load_scorers(asked)
    set_seed(config.seed)
    empty = _empty(asked.parts)
    pipeline = _pipeline(asked, unread, empty)
    runs = _runs(asked, pipeline, loaded, empty)
    judged = HeldOut(asked.held_out, loaded.judges, evaluation_id(config, asked.held_out))
    first = next(iter(runs.values()))  # what is judged is what trains
    training = Training(config, asked.accelerator, runs, asked.start, first.signals, judged)
    if asked.start.checkpoint:
        load_checkpoint(training.policies, asked.start.checkpoint)
    gate.check_schedule(first.stage.engine, size)
    with first.sampling():
        _check_pictures(first.stage.engine, asked.rows, size, config.arithmetic.precision)
    if asked.accelerator.is_main_process:
        trackers = tracker_arguments(config, asked.start)
        asked.accelerator.init_trackers("duet", init_kwargs=trackers)
    return training


def _ask(config: RunConfig) -> _Asked:
    """Read the rows and where the run begins; what does not go together is refused."""
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
    return _Asked(config, parts, accelerator, rows, held_out, divided, begun, start)


def _require_fit(asked: _Asked) -> None:
    device = asked.accelerator.device
    if device.type != "cuda":
        return
    memory = torch.cuda.get_device_properties(device).total_memory
    sizes = model_folder(asked.config.model.path)
    datasets = Datasets(Kinds.of(asked.rows, sizes), Kinds.of(asked.held_out, sizes))
    processes = asked.accelerator.num_processes
    for each in each_beside_others(asked.parts.values()):
        there = Deployment(sizes, processes, memory, each.others, sharding_engine(), datasets)
        require_fit(each.own, there)


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


def _unread(asked: _Asked) -> list[str]:
    """The AR, where a cache gives the decoder's priors and no held-out prompt asks for others;
    that the cache is this run's is checked here."""
    decoder, rows = asked.parts.get(DECODER.name), asked.rows
    if decoder is None or PriorCache.of(decoder) is None:
        return []
    ar, its = asked.start.inputs.model[AR.component], asked.begun.get(AR.name)
    from_main(
        asked.accelerator, lambda: check_cache(decoder, make_stamp(decoder, rows, ar, its), rows)
    )
    return [AR.component] if decoder.train.eval_steps is None else []


def _load_scorers(asked: _Asked) -> Loaded:
    loaded = load_scorers(asked.config, asked.parts)
    for name, part in asked.parts.items():
        if asked.divided[name].spread:
            processes = asked.accelerator.num_processes
            require_whole_groups(loaded.scorers[name], part, processes)
    return loaded


def _empty(parts: Mapping[str, RunConfig]) -> dict[str, Module]:
    """Parts that are built without weights, since no process is to hold all of them."""
    if not chosen_sharding().begins_empty:
        return {}
    return {
        name: build_empty(config.model.path, PARTS[name])
        for name, config in parts.items()
        if config.tuning == "full"
    }


def _pipeline(
    asked: _Asked, unread: Sequence[str], empty: Mapping[str, Module]
) -> GlmImagePipeline:
    """What is frozen has what `model.adapters` gives it."""
    model = asked.config.model
    made = {PARTS[name].component: module for name, module in empty.items()}
    device, left_out = str(asked.accelerator.device), [*unread, *made]
    pipeline = load_pipeline(model.path, model.dtype, device, model.offload, left_out)
    for component, module in made.items():
        setattr(pipeline, component, module)
    others = [part for part in PARTS.values() if part.name not in asked.parts]
    load_given(pipeline, asked.begun, [p.name for p in others if p.component not in unread])
    return pipeline


def _runs(
    asked: _Asked, pipeline: GlmImagePipeline, loaded: Loaded, empty: Mapping[str, Module]
) -> dict[str, Run]:
    """By part."""
    parts, accelerator, signals = asked.parts, asked.accelerator, Signals()
    stages = {
        name: STAGES[name](Engine.of(pipeline, part, asked.shows), part)
        for name, part in parts.items()
    }
    if not chosen_sharding().movable:  # whatever `model.offload` moves
        for stage in stages.values():
            stage.engine.placement.fixed |= {PARTS[name].component for name in parts}
    policies = {name: _policy(asked, stage, name in empty) for name, stage in stages.items()}
    wait_at_most(asked.config.train.ddp_timeout)
    return {
        name: Run(
            part,
            accelerator,
            asked.divided[name],
            stages[name],
            policies[name],
            policies,
            loaded.scorers[name],
            torch.tensor([r.weight for r in part.rewards]),
            asked.rows,
            signals,
        )
        for name, part in parts.items()
    }


def _policy(asked: _Asked, stage: Stage, empty: bool) -> Policy:
    part, sampler = stage.part, stage.engine
    config, begun = asked.parts[part.name], asked.begun.get(part.name)
    source, own = None, begun and begun.folder
    if empty:
        source, own = own or weights_of(config.model.path, part), None
    tuning = tuning_of(config, asked.start.inputs.model[part.component], own)
    module = part.module(sampler.pipeline)
    sampler.placement.bring(part.component)
    if config.optim.gradient_checkpointing:
        recompute_blocks(module, part.block)
    return Policy(
        asked.accelerator,
        module,
        tuning,
        config.optim,
        asked.divided[part.name].updates,
        config.average,
        source,
        compared=config.grpo.beta > 0,
    )


# torch's new name for it means something else, and accelerate passes on the old one alone
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
# asked for on purpose, see below
warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)


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
            # none may wait in one for the others' buffers, which no forward changes. Unless DDP
            # looks for unused parameters it sorts its buckets anew after the first update: three
            # processes and more then add up in another order than those of a resumed run
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
            ],
        )
