"""What `engines.py` starts on each process: updates of both stages by one engine.

    torchrun --nproc_per_node 2 -m duet.train.tiny.engine_updates FOLDER [ar-lora decoder-full ...]

Writes into FOLDER, for each stage and tuning, the checkpoint after three SGD steps, those of two
steps of AdamW, uninterrupted and resumed in between, and what was measured.
"""

import argparse
import gc
import json
import shutil
import time
from collections.abc import Sequence
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
from duet.rewards.base import RewardInput
from duet.train.advantages import group_advantages
from duet.train.checkpoint import save_checkpoint
from duet.train.collect import collect
from duet.train.environment import sharding_engine
from duet.train.learn import learn
from duet.train.run import Training
from duet.train.setup import prepare
from duet.train.state import load_state
from duet.train.tiny.gaps import SHIPPED

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"
CASES = ("decoder-lora", "decoder-full", "ar-lora", "ar-full", "decoder-lora-bf16", "ar-lora-bf16")
# of SGD: with larger ones each step would magnify the rounding of the one before
_RATES = {"decoder-lora": 100, "decoder-full": 30, "ar-lora": 0.01, "ar-full": 0.01}
_SAMPLES = 2  # of a prompt; one batch each in sampling, whatever the processes
# drawn in this order; of two processes the second one has glyphs of two lengths
_WORDS = ("CAT", "PEN", "DOG", "HELLO")
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
    "sampling.num_inference_steps=6",
    "rewards=[{name: duet.train.tiny.engine_updates.Alternating}]",
    "train.trackers=[]",
    "train.max_steps=2",
)


class Alternating:
    """0 and 1 in turn: what a pixel that rounds to its other neighbour cannot move."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [float(place % _SAMPLES) for place in range(len(inputs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", default=CASES)
    options = parser.parse_args()
    for case in options.cases:
        measured = measure(case, options.folder / case)
        if PartialState().is_main_process:
            (options.folder / case / "measured.json").write_text(json.dumps(measured))


def measure(case: str, folder: Path) -> dict[str, float | str | bool]:
    with mock.patch("duet.train.policy.AdamW", _sgd):
        rate = f"optim.learning_rate={_RATES[case.removesuffix('-bf16')]}"
        steps = ("grpo.num_iterations=3", "optim.max_grad_norm=1000")
        _step(_prepare(case, folder / "sgd", _SAMPLES, rate, *steps), 0)
    whole = _prepare(case, folder / "adam", 2 * _SAMPLES)
    policy = whole.at(0).policy
    held = sum(value.numel() for value in policy.held)
    seconds = [_step(whole, step) for step in range(2)]
    moments = sum(moment.numel() for moment in policy.sharding.moments())
    skipped, refused = _skips(whole), _refuses(whole, folder)
    del policy, whole
    go_on(case, folder / "adam" / "checkpoint-1", folder / "resumed")
    return {
        "engine": sharding_engine(),
        "processes": PartialState().num_processes,
        "weights": held,
        "moments": moments,
        "skipped": skipped,
        "refused": refused,
        "seconds": seconds[1],
    }


def go_on(case: str, checkpoint: Path, output: Path) -> None:
    """The second step of AdamW, after the first one's checkpoint; writes its own. `output` lies
    in a folder of a folder with the rows (`write_rows`)."""
    _step(_prepare(case, output, 2 * _SAMPLES, f"train.resume={checkpoint}"), 1)
    _forget()


def _skips(training: Training) -> bool:
    """A loss that is not finite on the last process: does every one leave its weights alone?"""
    run = training.at(0)
    accelerator, policy = run.accelerator, run.policy
    collected = collect(run, 0)
    before = [value.detach().clone() for value in policy.held]
    last = accelerator.process_index == accelerator.num_processes - 1
    samples = sum(map(len, collected.rollouts))
    gains = torch.full([samples], torch.nan if last else 1.0)
    learn(run, collected.rollouts, gains, first=False)
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
    stage, tuning, *low = case.split("-")
    precision = SHIPPED if low else []
    own = len(_WORDS) * _SAMPLES // PartialState(cpu=True).num_processes
    batch = min(batch, own)
    sizes = [
        f"optim.per_device_train_batch_size={batch}",
        f"optim.gradient_accumulation_steps={own // batch}",
    ]
    data = f"data.train={output.parents[1] / 'rows.jsonl'}"
    given = [
        *_COMMON,
        *precision,
        *sizes,
        data,
        f"tuning={tuning}",
        f"output_dir={output}",
        *overrides,
    ]
    return prepare(load_config(TINY / f"{stage}.yaml", given))


def write_rows(folder: Path) -> None:
    """What the runs are trained on. Before they start."""
    rows = [""] * len(_WORDS)
    for place, word in zip(_ORDER, _WORDS, strict=True):
        rows[place] = json.dumps({"prompt": f'a red card with the white word "{word}"'})
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("\n".join(rows))


def _forget() -> None:
    """What accelerate keeps of the run before; the processes stay."""
    gc.collect()
    AcceleratorState._reset_state()


def _step(training: Training, step: int) -> float:
    """One rollout with its updates, and a checkpoint; the seconds without it."""
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
    return seconds


if __name__ == "__main__":
    main()
