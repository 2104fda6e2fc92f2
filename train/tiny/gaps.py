"""How far replayed log-probs are from the sampler's: the right engine, and broken ones.

    python -m duet.train.tiny.gaps [--device cuda] [--prompts 8]

Prints the table of `configs/tiny/RESULTS.md`: both stages, float32 and bfloat16, and
whether the gate refuses.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.row import Row
from duet.configs.rows import load_rows
from duet.configs.schema import RunConfig
from duet.inference import autoregressive, decoder, prompt
from duet.inference.adapters import adapter_disabled, add_adapter
from duet.inference.engine import Engine
from duet.inference.model import load_pipeline
from duet.inference.parts import PARTS
from duet.inference.rollout import Rollout
from duet.train import gate
from duet.train.gap import Gap
from duet.train.prompts import draw_groups
from duet.train.stages import STAGES, Stage, sampled_logprobs
from duet.train.update import micro_batches, replay

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
SHIPPED = ["model.dtype=bfloat16", "train.mixed_precision=bf16"]  # as configs/glm_image has it
PRECISIONS = {"float32": [], "bfloat16": SHIPPED}


@dataclass(frozen=True)
class Bench:
    """One stage in one precision, with rollouts to be scored again."""

    config: RunConfig
    stage: Stage
    module: torch.nn.Module
    rollouts: list[Rollout]

    @property
    def batch_size(self) -> int:
        return self.config.optim.per_device_train_batch_size


def make_bench(stage: str, precision: str, *overrides: str, updates: int = 80) -> Bench:
    """The shipped tiny config with an adapter as far from 0 as a walk of so many updates.

    80 are those of a decoder's quickstart. In bfloat16 an adapter that has hardly moved cannot
    be told from rounding, and does not matter.
    """
    sharp = "sampling.temperature=0.9"  # 1 would hide a temperature that is applied twice
    config = load_config(TINY / f"{stage}.yaml", [*PRECISIONS[precision], sharp, *overrides])
    pipeline = load_pipeline(str(TINY / "model"), config.model.dtype, config.model.device)
    engine = Engine.of(pipeline, config, progress=False)
    part = PARTS[stage]
    module = part.module(pipeline)
    torch.manual_seed(0)
    add_adapter(module, part, config.lora.rank, config.lora.alpha, config.lora.target_modules)
    walk(module, config.optim.learning_rate * updates**0.5)
    made = STAGES[stage](engine, config)
    # prompts alone: the AR draws the priors, as with the real model's prompts
    rows = [Row({"prompt": row.prompt}) for row in load_rows(TINY / "prompts" / "eval.jsonl")]
    groups = draw_groups(
        rows, 0, 0, config.rollout.prompts_per_step, config.rollout.num_generations
    )
    with torch.no_grad():
        rollouts = engine.rollout(made.requests(groups), made.window(0))
    return Bench(config, made, module, rollouts)


def walk(module: torch.nn.Module, distance: float) -> None:
    """Bring every weight of a fresh adapter's B so far from 0: Adam steps by the sign."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data += distance * torch.randn_like(parameter).sign()


@contextmanager
def right(bench: Bench) -> Iterator[Sequence[Rollout]]:
    yield bench.rollouts


@contextmanager
def text_positions(bench: Bench) -> Iterator[Sequence[Rollout]]:
    """Image tokens stand where text would: what a forward without position_ids does."""

    def line(grids):
        return torch.arange(sum(g.count for g in grids)).expand(3, -1)

    with mock.patch.object(prompt, "grid_positions", line):
        yield bench.rollouts


@contextmanager
def support_ignored(bench: Bench) -> Iterator[Sequence[Rollout]]:
    yield [replace(r, tokens=replace(r.tokens, support=None)) for r in bench.rollouts]


@contextmanager
def temperature_twice(bench: Bench) -> Iterator[Sequence[Rollout]]:
    hot = bench.config.sampling.temperature**2
    yield [replace(r, tokens=replace(r.tokens, temperature=hot)) for r in bench.rollouts]


@contextmanager
def padding_as_text(bench: Bench) -> Iterator[Sequence[Rollout]]:
    with mock.patch.object(autoregressive, "not_padding", lambda rows, device: None):
        yield bench.rollouts


@contextmanager
def adapter_off(bench: Bench) -> Iterator[Sequence[Rollout]]:
    with adapter_disabled(bench.module):
        yield bench.rollouts


@contextmanager
def wrong_timestep(bench: Bench) -> Iterator[Sequence[Rollout]]:
    """The model is told the schedule's timestep, not that minus 1."""
    true = decoder.velocity
    with mock.patch.object(decoder, "velocity", lambda d, x, t, g, s: true(d, x, t + 1, g, s)):
        yield bench.rollouts


@contextmanager
def next_timestep(bench: Bench) -> Iterator[Sequence[Rollout]]:
    """A replay at the window's next step."""
    yield [_replayed(r, window=_shifted(r.latents.how.window)) for r in bench.rollouts]


def _shifted(window: range) -> range:
    return range(window.start + 1, window.stop + 1)


@contextmanager
def unshifted_sigmas(bench: Bench) -> Iterator[Sequence[Rollout]]:
    """sigma = t / 1000."""
    yield [_replayed(r, schedule=_unshifted(r.latents.how.schedule)) for r in bench.rollouts]


def _unshifted(schedule):
    plain = torch.cat([schedule.timesteps / 1000, schedule.sigmas[-1:]])
    return replace(schedule, sigmas=plain)


def _replayed(rollout: Rollout, **how) -> Rollout:
    latents = rollout.latents
    return replace(rollout, latents=replace(latents, how=replace(latents.how, **how)))


@contextmanager
def another_prior(bench: Bench) -> Iterator[Sequence[Rollout]]:
    """Each group is replayed with the prior tokens of the next one."""
    priors = [r.latents.given.prior for r in bench.rollouts]
    changed = []
    for rollout, prior in zip(bench.rollouts, priors[1:] + priors[:1], strict=True):
        given = replace(rollout.latents.given, prior=prior)
        changed.append(replace(rollout, latents=replace(rollout.latents, given=given)))
    yield changed


Breakage = Callable[[Bench], Iterator[Sequence[Rollout]]]
BREAKAGES: dict[str, list[Breakage]] = {
    "ar": [text_positions, support_ignored, temperature_twice, padding_as_text, adapter_off],
    "decoder": [wrong_timestep, next_timestep, unshifted_sigmas, another_prior, adapter_off],
}


def rescored(bench: Bench, breakage: Breakage = right) -> torch.Tensor:
    """Log-probs [B, T] of the bench's rollouts by a (broken) replay."""
    with breakage(bench) as rollouts:
        batches = micro_batches(rollouts, bench.batch_size)
        return replay(bench.stage, bench.module, batches)


_HEAD = (
    "stage", "precision", "engine", "mean ratio", "sharpness", "mean", "p99", "p99.9", "largest",
    "gate",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--prompts", type=int, default=8, help="groups of 8 samples")
    options = parser.parse_args()
    print(f"| {' | '.join(_HEAD)} |\n{'|---' * len(_HEAD)}|")
    for stage, broken in BREAKAGES.items():
        for precision in PRECISIONS:
            asked = f"rollout.prompts_per_step={options.prompts}"
            bench = make_bench(stage, precision, asked, f"model.device={options.device}")
            for breakage in (right, *broken):
                print(_line(bench, stage, precision, breakage), flush=True)


def _line(bench: Bench, stage: str, precision: str, breakage: Breakage) -> str:
    again = rescored(bench, breakage)
    gap = Gap.of(again, sampled_logprobs(bench.stage, bench.rollouts, again.device))
    figures = gap.sharpness, gap.mean, gap.p99, gap.p999, gap.max
    cells = [stage, precision, breakage.__name__.replace("_", " "), f"{gap.mean_ratio:.5f}"]
    cells += [f"{value:.1e}" for value in figures]
    return f"| {' | '.join([*cells, verdict(bench, breakage, again)])} |"


def verdict(bench: Bench, breakage: Breakage, again: torch.Tensor) -> str:
    """`passes`, or what the gate refuses; `again`: what the (broken) replay gave."""
    precision, size = bench.config.arithmetic.precision, bench.stage.size
    try:
        gate.check_gap(bench.stage, bench.rollouts, again, precision)
        with breakage(bench):
            gate.check_schedule(bench.stage.engine, size)
            prompt_text = bench.rollouts[0].request.prompt
            gate.check_reference(bench.stage.engine, prompt_text, size, precision)
    except UserError as error:
        reason = str(error).removeprefix("training refuses to start: ")
        return f"refuses: {reason.partition(':')[0]}"
    return "passes"


if __name__ == "__main__":
    main()
