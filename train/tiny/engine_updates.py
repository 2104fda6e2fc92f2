"""What `engines.py` starts on each process: updates of both stages by one engine.

    torchrun --nproc_per_node 2 -m duet.train.tiny.engine_updates FOLDER BEGUN [--double] [CASE ...]
        [KEY=VALUE ...]

Writes into FOLDER, for each stage and tuning, the checkpoints of two steps of AdamW, uninterrupted
and resumed in between, the one after three SGD steps of a run that begins on the first one of
BEGUN, a FOLDER too, with --double that after three in float64, and what was measured. Where BEGUN
is FOLDER, which others are compared with, one step of AdamW and the SGD steps are all. Settings
given by KEY=VALUE are those of every run.
"""

import argparse
import gc
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch.optim import SGD, Optimizer

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.inference.rollout import Rollout
from duet.rewards.base import RewardInput
from duet.train.advantages import group_advantages
from duet.train.checkpoint import save_checkpoint
from duet.train.collect import collect
from duet.train.environment import sharding_engine
from duet.train.learn import learn
from duet.train.run import Run, Training
from duet.train.setup import prepare
from duet.train.sharding import Sharding
from duet.train.state import load_state
from duet.train.tiny.double_precision import in_double_precision
from duet.train.tiny.gaps import SHIPPED
from duet.train.tiny.world import draw, sample_card

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
# those first whose blocks are computed again: for the others ZeRO-3 changes the linear layers of
# the process, and they stay so
CASES = (
    "decoder-lora-bf16",
    "ar-lora-bf16",
    "decoder-lora-edits",
    "ar-lora-edits",
    "decoder-lora",
    "decoder-full",
    "ar-lora",
    "ar-full",
)
# of SGD: with larger ones each step would magnify the rounding of the one before
_RATES = {"decoder-lora": 10, "decoder-full": 30, "ar-lora": 0.01, "ar-full": 0.01}
_SAMPLES = 2  # of a prompt; one batch each in sampling, whatever the processes
# drawn in this order; of two processes the second one has glyphs of two lengths
_WORDS = ("CAT", "PEN", "DOG", "HELLO")
# of the prompts that edit; with two processes the second one has more. The AR's all have some: a
# prompt without writes 253 tokens, an edit 6
_SOURCES = {"decoder": (0, 1, 2, 1), "ar": (1, 1, 2, 1)}
_ORDER = np.random.default_rng([0, 0]).permutation(len(_WORDS))
_COMMON = (
    f"rollout.prompts_per_step={len(_WORDS)}",
    f"rollout.num_generations={_SAMPLES}",
    f"rollout.batch_size={_SAMPLES}",
    "optim.lr_scheduler_type=constant",
    "grpo.num_iterations=1",
    "grpo.beta=0.01",
    "grpo.epsilon=0.9",
    "grpo.epsilon_high=10",
    "optim.max_grad_norm=1e-3",  # less than any gradient's
    "sampling.num_inference_steps=6",
    "rewards=[{name: duet.train.tiny.engine_updates.Alternating}]",
    "train.trackers=[]",
    "train.max_steps=2",
    "train.ddp_timeout=300",
)


class Alternating:
    """0 and 1 in turn: what a pixel that rounds to its other neighbour cannot move."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [float(place % _SAMPLES) for place in range(len(inputs))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("begun", type=Path)
    parser.add_argument("asked", nargs="*", metavar="CASE | KEY=VALUE")
    parser.add_argument("--double", action="store_true")
    options = parser.parse_args(arguments)
    overrides = [word for word in options.asked if "=" in word]
    for case in [word for word in options.asked if "=" not in word] or CASES:
        measured = measure(case, options.folder / case, options.begun / case, *overrides)
        if options.double and not case.endswith("bf16"):
            with in_double_precision():
                _three_of_sgd(case, options.folder / case / "double", *overrides)
        if PartialState().is_main_process:
            (options.folder / case / "measured.json").write_text(json.dumps(measured))


def measure(case: str, folder: Path, begun: Path, *overrides: str) -> dict[str, float | str | bool]:
    with _noting_what_is_spread() as empty:
        whole = _prepare(case, folder / "adam", 2 * _SAMPLES, *overrides)
    policy = whole.at(0).policy
    _step(whole, 0)
    measured = {
        "engine": sharding_engine(),
        "processes": PartialState().num_processes,
        "began_empty": all(gather_object(empty)),
        "weights": sum(value.numel() for value in policy.held),
        "moments": sum(moment.numel() for moment in policy.sharding.moments()),
    }
    del policy
    if begun != folder:
        second = _step(whole, 1)
        with _autocast_as_on_a_gpu(whole.at(0)) as seen:
            skipped = _skips(whole, second.rollouts)
        refused, kept = _refuses(whole, folder), all(gather_object([seen == {True}]))
        measured |= {"skipped": skipped, "refused": refused, "autocast": kept}
        measured["seconds"] = second.seconds
        del whole
        go_on(case, folder / "adam" / "checkpoint-1", folder / "resumed", *overrides)
    adapters = f"model.adapters=[{begun}/adam/checkpoint-1]"
    _three_of_sgd(case, folder / "sgd", adapters, *overrides)
    return measured


@contextmanager
def _noting_what_is_spread() -> Iterator[list[bool]]:
    """Had the module no weights yet?"""
    empty, true = [], Sharding.__init__

    def spread(self, accelerator, module, block) -> None:
        empty.append(all(p.is_meta for p in module.parameters()))
        true(self, accelerator, module, block)

    with mock.patch.object(Sharding, "__init__", spread):
        yield empty


def _three_of_sgd(case: str, output: Path, *overrides: str) -> None:
    with mock.patch("duet.train.policy.AdamW", _sgd):
        rate = _RATES["-".join(case.split("-")[:2])]
        steps = (f"optim.learning_rate={rate}", "grpo.num_iterations=3", "optim.max_grad_norm=1000")
        _step(_prepare(case, output, _SAMPLES, *steps, *overrides), 0)
    _forget()


def go_on(case: str, checkpoint: Path, output: Path, *overrides: str) -> None:
    """The second step of AdamW, after the first one's checkpoint; writes its own. `output` lies
    in a folder of a folder with the rows (`write_rows`)."""
    resume = f"train.resume={checkpoint}"
    _step(_prepare(case, output, 2 * _SAMPLES, resume, *overrides), 1)
    _forget()


@contextmanager
def _autocast_as_on_a_gpu(run: Run) -> Iterator[set[bool]]:
    """While open mixed precision is on, also for who asks for a GPU's by naming no device: in
    whether each forward of the policy runs in it.
    """
    seen: set[bool] = set()
    noted = run.policy.inner.register_forward_pre_hook(
        lambda *_: seen.add(torch.is_autocast_enabled("cpu"))
    )
    torch.set_autocast_enabled("cuda", True)
    with mock.patch.object(run.stage.engine, "autocast", torch.bfloat16):
        yield seen
    torch.set_autocast_enabled("cuda", False)
    noted.remove()


def _skips(training: Training, rollouts: list[Rollout]) -> bool:
    """A loss that is not finite on the last process: does every one leave its weights alone?"""
    run = training.at(0)
    accelerator, policy = run.accelerator, run.policy
    before = [value.detach().clone() for value in policy.held]
    last = accelerator.process_index == accelerator.num_processes - 1
    gains = torch.full([sum(map(len, rollouts))], torch.nan if last else 1.0)
    learn(run, rollouts, gains, first=False)
    same = all(map(torch.equal, before, policy.held)) and policy.skipped_in_a_row == 1
    return all(gather_object([same]))


class _Hostile:
    """Pickled, it makes a file when it is read by what runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def _refuses(training: Training, folder: Path) -> bool:
    """An optimizer's file that would run code: is it refused, and did it run none?"""
    run = training.at(0)
    own = folder / f"hostile-{run.accelerator.process_index}"
    shutil.copytree(folder / "adam" / "checkpoint-2", own)
    torch.save(_Hostile(own / "ran"), own / "state" / "optimizer.bin")
    try:
        load_state(run.accelerator, [run.policy.sharding], own)
    except UserError as error:
        refused = "damaged" in str(error) and not (own / "ran").exists()
    else:
        refused = False
    return all(gather_object([refused]))


def _sgd(parameters: list[torch.Tensor], lr: float, **rest: object) -> Optimizer:
    return SGD(parameters, lr)


def _prepare(case: str, output: Path, batch: int, *overrides: str) -> Training:
    _forget()
    stage, tuning, *more = case.split("-")
    own = len(_WORDS) * _SAMPLES // PartialState(cpu=True).num_processes
    batch = min(batch, own)
    sizes = [
        f"optim.per_device_train_batch_size={batch}",
        f"optim.gradient_accumulation_steps={own // batch}",
    ]
    rows = output.parents[1] / (_edits(stage) if "edits" in more else "rows.jsonl")
    given = [
        *_COMMON,
        *(SHIPPED if "bf16" in more else []),
        *sizes,
        f"data.train={rows}",
        f"optim.gradient_checkpointing={bool(more)}",
        f"tuning={tuning}",
        f"output_dir={output}",
        *overrides,
    ]
    return prepare(load_config(TINY / f"{stage}.yaml", given))


def write_rows(folder: Path) -> None:
    """What the runs are trained on. Before they start."""
    folder.mkdir(parents=True)
    edits = {_edits(stage): counts for stage, counts in _SOURCES.items()}
    for name, counts in {"rows.jsonl": (0,) * len(_WORDS), **edits}.items():
        rows = [""] * len(_WORDS)
        for place, word, count in zip(_ORDER, _WORDS, counts, strict=True):
            # encoded to the decoder's prior: the AR would take a third of the time
            row = {"prompt": f'a red card with the white word "{word}"', "image": "card.png"}
            sources = {"sources": ["card.png", "large.png"][:count]} if count else {}
            rows[place] = json.dumps(row | sources)
        (folder / name).write_text("\n".join(rows))
    card = sample_card(random.Random(0))
    draw(card).save(folder / "card.png")
    draw(card, 1.5).save(folder / "large.png")


def _edits(stage: str) -> str:
    return f"edits-{stage}.jsonl"


def _forget() -> None:
    """What accelerate keeps of the run before; the processes stay."""
    gc.collect()
    AcceleratorState._reset_state()


@dataclass(frozen=True)
class _Step:
    rollouts: list[Rollout]
    seconds: float  # without the checkpoint


def _step(training: Training, step: int) -> _Step:
    """One rollout with its updates, and a checkpoint."""
    run, config, start = training.at(step), training.config, time.perf_counter()
    collected = collect(run, step)
    advantages = group_advantages(
        collected.all_scores.table, run.weights, collected.all_group_ids, run.config.grpo
    )
    learn(run, collected.rollouts, collected.own(advantages.values), first=step == 0)
    seconds = time.perf_counter() - start
    save_checkpoint(
        training.policies, config, training.start.run_id, training.start.inputs, step + 1
    )
    return _Step(collected.rollouts, seconds)


if __name__ == "__main__":
    main()
