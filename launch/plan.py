"""duet plan: what a config takes, counted without weights and without a GPU.

    duet plan CONFIG [KEY=VALUE ...] [--gpus N] [--engine NAME] [--card NAME] [--memory-gib M]

Memory by phase and by what holds it, FLOPs, bytes and seconds of a step, and how prompts and
samples divide. Sizes are those of the config.json files of model.path where it is a folder,
else the released GLM-Image's. Of datasets on this disk the edit with the most source tokens counts.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from duet.configs.load import load_config
from duet.configs.rows import stored_rows
from duet.configs.schema import RunConfig
from duet.configs.turns import each_beside_others, turns
from duet.inference.shapes import Scale, Sizes
from duet.launch.cost import CARDS, COMPUTE, COPY_BANDWIDTH, LAUNCH_SECONDS, MEMORY, Card, costs
from duet.rewards.sizes import reward_sizes
from duet.train.environment import Engine
from duet.train.fitting import Deployment, savings
from duet.train.geometry import changed, nearest_geometry
from duet.train.kinds import Datasets, Kinds
from duet.train.made_up import GLYPH_TOKENS, PROMPT_TOKENS
from duet.train.memory import GIB, Phase, Step, peak, phases, step_of


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="duet plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--engine", choices=get_args(Engine), default="ddp", help="what spreads the training"
    )
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--memory-gib", type=float, help="default: the card's")
    options = parser.parse_args(arguments)
    if options.gpus < 1:
        parser.error("--gpus: 1 or more")
    config = load_config(options.config, options.overrides)
    parts = turns(config).values()
    for part in parts:
        part.require_trainable()
    card, kinds = CARDS[options.card], kinds_of(config)
    memory = options.memory_gib or card.gib
    for name, found in kinds.items():
        told = found or "not counted, since it is not on this disk"
        print(f"edits in data.{name} = {getattr(config.data, name)!r}: {told}")
    datasets = Datasets(**{name: found for name, found in kinds.items() if found})
    for each in each_beside_others(parts):
        asked = each.own, each.others, options.gpus, card, memory, options.engine, datasets
        for line in page(*asked):
            print(line)


def kinds_of(config: RunConfig) -> dict[str, Kinds | None]:
    """Of the rows of each dataset that a run reads; None where they are not on this disk."""
    names = ("train",) if config.train.eval_steps is None else ("train", "eval")
    rows = {name: stored_rows(config, name) for name in names}
    sizes = sizes_of(config)
    return {n: None if own is None else Kinds.of(own, sizes) for n, own in rows.items()}


def page(
    asked: RunConfig,
    beside: Sequence[RunConfig],
    gpus: int,
    card: Card,
    memory_gib: float,
    engine: Engine = "ddp",
    datasets: Datasets = Datasets(),
) -> Iterator[str]:
    """Of one turn; `beside`: the run's others."""
    sizes = sizes_of(asked)
    named = sizes if isinstance(sizes, Path) else "the released GLM-Image"
    yield f"{asked.stage}: sizes of {named}, an estimate"
    changes = nearest_geometry(asked, gpus)
    config = changed(asked, changes)
    yield from _geometry(config, gpus, changes)
    step = step_of(config, sizes, gpus, datasets)
    found = phases(config, step, gpus, beside, engine)
    yield ""
    yield from _table(found)
    unknown = reward_sizes((*config.rewards, *config.watch.rewards)).unknown
    if unknown:
        yield f"not counted: the weights of {', '.join(unknown)}"
    worst = peak(found)
    needed = worst.total / GIB
    fits = needed <= memory_gib
    verdict = "fits" if fits else "does not fit"
    yield f"\npeak {needed:.1f} GiB in phase {worst.name!r}: {verdict} in {memory_gib:g} GiB"
    if not fits:
        memory = int(memory_gib * GIB)
        yield _advice(config, Deployment(sizes, gpus, memory, beside, engine, datasets))
        if "reward models" in worst.held:
            yield "reward models may be on the CPU, by their args: {device: cpu}"
    yield ""
    yield from _seconds(config, step, card)


def sizes_of(config: RunConfig) -> Sizes:
    """Those of the model's folder, where it is one."""
    folder = Path(config.model.path)
    return folder if (folder / "model_index.json").is_file() else Scale()


def _geometry(config: RunConfig, gpus: int, changes: Mapping[str, Any]) -> Iterator[str]:
    rollout, optim = config.rollout, config.optim
    if changes:
        yield f"as it stands it does not divide; the nearest that does: {_told(changes)}"
    own = rollout.prompts_per_step * rollout.num_generations // gpus
    spread = ", groups on several GPUs" if rollout.prompts_per_step % gpus else ""
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    yield (
        f"a step: {rollout.prompts_per_step} prompts x {rollout.num_generations} samples over "
        f"{gpus} GPUs = {own} samples a GPU{spread}; "
        f"{config.grpo.num_iterations * own // share} updates of "
        f"{optim.per_device_train_batch_size} x {optim.gradient_accumulation_steps} "
        f"(micro-batch x accumulation) = {share * gpus} samples over all GPUs"
    )


def _table(found: Sequence[Phase]) -> Iterator[str]:
    names = list(dict.fromkeys(name for phase in found for name in phase.held))
    widths = [max(8, len(phase.name)) for phase in found]
    first = max(map(len, names))

    def line(name: str, cells: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{name:<{first}}  {'  '.join(padded)}"

    yield line("GiB", [phase.name for phase in found])
    for name in names:
        yield line(name, [_gib(phase.held.get(name, 0)) for phase in found])
    yield line("total", [_gib(phase.total) for phase in found])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _advice(config: RunConfig, there: Deployment) -> str:
    ways = [{}, {"tuning": "lora"}] if config.tuning == "full" else [{}]
    found = [(way, savings(changed(config, way), there)) for way in ways]
    told = ", or with ".join(_told(way | more) for way, more in found if more is not None)
    return f"it would with {told}" if told else "no setting of Duet makes it fit"


def _told(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())


def _seconds(config: RunConfig, step: Step, card: Card) -> Iterator[str]:
    yield (
        f"one step on {card.name} ({card.flops / 1e12:.0f} TFLOPS, "
        f"{card.bandwidth / 1e9:.0f} GB/s), an estimate"
    )
    yield (
        f"  assumed: {COMPUTE:.0%} of its computing, {MEMORY:.0%} of its memory's speed, "
        f"{LAUNCH_SECONDS * 1e6:.0f} us a kernel at least,"
    )
    yield (
        f"  copies of {COPY_BANDWIDTH / 1e9:.0f} GB/s, prompts of {PROMPT_TOKENS} tokens, "
        f"glyph texts of {GLYPH_TOKENS}"
    )
    total = 0.0
    for cost in costs(config, step):
        seconds = cost.seconds(card)
        total += seconds
        yield (
            f"  {cost.phase:<26}{cost.flops / 1e12:>10.0f} TFLOP"
            f"{(cost.bytes + cost.copied) / 1e12:>9.2f} TB{seconds:>9.0f} s"
        )
    yield f"  {'total':<26}{total:>39.0f} s, rewards and waiting aside"
