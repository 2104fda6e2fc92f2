"""Full tuning and averages: what trains, what it is compared with, what is saved and read back."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import GlmImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import GlmImageForConditionalGeneration

from duet.configs.digests import SUMS, write_digests
from duet.configs.errors import UserError
from duet.configs.schema import Arithmetic, AverageConfig, LoraConfig, OptimConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.engine import Engine
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.request import Request
from duet.inference.trained import averaged, check_trained, load_trained, trained_info
from duet.inference.weights import INFO, restore_weights
from duet.train.policy import Policy
from duet.train.setup import prepare
from duet.train.tiny.gaps import SHIPPED
from duet.train.tuning import Full, Lora, Tuning
from tests.conftest import MODEL, SAMPLING, SIZE, train

STAGES = ["ar", "decoder"]
STOCK = {"ar": GlmImageForConditionalGeneration, "decoder": GlmImageTransformer2DModel}
FULL = [
    "tuning=full",
    "grpo.beta=0.01",
    "optim.learning_rate=1e-5",
    "optim.lr_scheduler_type=constant",
    "average={decay: 0.5, start: 0}",
]
PROMPT = 'a red card with the white word "CAT"'


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def info_of(stage: str, tuning: str, arithmetic: Arithmetic = Arithmetic()) -> Tuning:
    base = base_fingerprint(str(MODEL), PARTS[stage].component)
    told = stage, str(MODEL), base, arithmetic
    if tuning == "full":
        return Full(Provenance(*told))
    return Lora(AdapterInfo(*told, LoraConfig(2, 4.0)))


def policy_of(stage: str, tuning: str, average: AverageConfig | None = None) -> Policy:
    AcceleratorState._reset_state(True)
    module = PARTS[stage].module(load_pipeline(str(MODEL)))
    optim = OptimConfig(learning_rate=1e-3, max_grad_norm=1e9)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    return Policy(accelerator, module, info_of(stage, tuning), optim, 9, average)


def update(policy: Policy) -> None:
    """By gradients that are the weights' own signs and sizes, all of them."""
    loss = sum((p * p.detach().add(0.1)).sum() for p in policy.trained)
    with policy.accelerator.accumulate(policy.module):
        policy.accelerator.backward(loss)
        assert policy.step(loss).made


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture(params=[(s, p) for s in STAGES for p in ("float32", "bf16")], ids="-".join)
def trained(request, runs, small_run, tmp_path_factory):
    """Two steps of full tuning, saved after each; one run a stage and precision."""
    stage, precision = request.param
    name = "-".join(request.param)
    if name not in runs:
        folder = tmp_path_factory.mktemp(name) / "run"
        train(config_of(small_run, stage, precision, folder))
        runs[name] = folder
    return stage, precision, runs[name]


def config_of(small_run, stage: str, precision: str, folder: Path, *overrides: str):
    mixed = SHIPPED if precision == "bf16" else []
    return small_run(stage, *FULL, *mixed, f"output_dir={folder}", *overrides)


def test_all_that_a_forward_passes_trains(trained, pipeline):
    """Through every gate, from the first step on; idle submodules stay as they were."""
    stage, precision, run = trained
    first, second = metrics(run)
    assert first["kl"] == 0 and second["kl"] > 0, "the reference is what the run began with"
    for step in (first, second):
        assert step["grad_norm"] > 0 and step["ratio/mean"] == pytest.approx(1, abs=1e-4)
    part = PARTS[stage]
    before = {n: p.to(torch.float32) for n, p in part.module(pipeline).state_dict().items()}
    if precision == "bf16":
        before = {n: v.bfloat16().float() for n, v in before.items()}
    after = saved(run / "checkpoint-2" / "weights")
    assert before.keys() == after.keys()
    for name, value in after.items():
        idle = name.startswith(tuple(f"{i}." for i in part.idle) or ("none",))
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]) == idle, name
    log = (run / "train.log").read_text().splitlines()[0]
    count = sum(v.numel() for n, v in after.items() if not torch.equal(v, before[n]))
    assert f"{count:,} of {sum(v.numel() for v in after.values()):,} parameters train" in log
    assert "full tuning, averaged with decay 0.5" in log


def test_a_resumed_run_ends_in_the_very_same_weights_and_averages(trained, small_run, tmp_path):
    stage, precision, run = trained
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copytree(run / "checkpoint-1", parts / "checkpoint-1")
    line, _ = (run / "metrics.jsonl").read_text().splitlines()
    (parts / "metrics.jsonl").write_text(line + "\n")
    saving = ["optim.gradient_checkpointing=true"]  # changes memory alone, so a resume takes it
    if stage == "decoder":
        saving += ["lora.rank=3"]  # not used
    train(config_of(small_run, stage, precision, parts, "train.resume=latest", *saving))
    for folder in ("weights", "average"):
        ended, again = (saved(r / "checkpoint-2" / folder) for r in (run, parts))
        assert equal(ended, again), folder
        assert not equal(ended, saved(run / "checkpoint-1" / folder)), "the last step must learn"
    assert metrics(parts)[1]["kl"] == metrics(run)[1]["kl"], "compared with the base again"


def test_stock_loads_the_weights_and_the_average(trained):
    stage, _, run = trained
    for folder in ("weights", "average"):
        path = run / "checkpoint-2" / folder
        stock, told = STOCK[stage].from_pretrained(path, output_loading_info=True)
        assert not any(told.values())
        assert equal(stock.state_dict(), saved(path))


def pictures(pipeline, autocast) -> list:
    made = Engine(pipeline, SAMPLING, autocast=autocast, progress=False)
    rollout = made.rollout([Request(PROMPT, (1, 2), SIZE)], range(1, 2))[0]
    return [*map(np.asarray, rollout.images), rollout.tokens.logprobs, rollout.latents.logprobs]


def same(one: list, other: list) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_loaded_is_the_policy_in_training(trained, small_run):
    """Weights and average, pictures and log-probs, to the bit."""
    stage, precision, run = trained
    AcceleratorState._reset_state(True)
    resumed = prepare(config_of(small_run, stage, precision, run, "train.resume=latest"))
    pipeline, autocast = resumed.stage.engine.pipeline, resumed.stage.engine.autocast
    with resumed.policy.sampling():
        policy = pictures(pipeline, autocast)
        with resumed.policy.averaged():
            average = pictures(pipeline, autocast)
        assert same(pictures(pipeline, autocast), policy), "swapped back"
    for checkpoint, expected in (
        (str(run / "checkpoint-2"), policy),
        (averaged(run / "checkpoint-2"), average),
    ):
        loaded = load_pipeline(str(MODEL), resumed.config.model.dtype)
        assert load_trained(loaded, checkpoint).stage == stage
        assert not any(p.requires_grad for p in PARTS[stage].module(loaded).parameters())
        assert same(pictures(loaded, autocast), expected)
    assert not same(policy, average)
