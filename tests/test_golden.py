"""Golden metrics: four steps a stage, float32, one thread, two passes over a rollout.

OMP_NUM_THREADS=1 python -m duet.train configs/tiny/STAGE.yaml OVERRIDES (below)
"""

import json
from dataclasses import replace

import pytest
import torch

from duet.configs.load import load_config
from tests.conftest import ROOT, train

OVERRIDES = [
    "data.train=configs/tiny/prompts/train.jsonl",
    "sampling.temperature=1",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=4",
    "optim.per_device_train_batch_size=4",
    "optim.gradient_accumulation_steps=1",
    "grpo.num_iterations=2",
    "grpo.beta=0.01",
    "train.max_steps=4",
    "train.save_steps=4",
]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stage", ["ar", "decoder"])
def test_four_steps_give_the_golden_metrics(small_run, stage, tmp_path, one_thread):
    shipped = load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml").rewards
    train(replace(small_run(stage, *OVERRIDES), rewards=shipped))
    made = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    golden = (ROOT / "tests" / "golden" / f"{stage}.jsonl").read_text().splitlines()
    assert len(made) == len(golden) == 4
    for ours, expected in zip(map(json.loads, made), map(json.loads, golden), strict=True):
        # other processors' kernels round differently, and Adam turns that into whole steps
        close = {name: pytest.approx(value, rel=2e-3, abs=1e-5) for name, value in expected.items()}
        assert {name: ours[name] for name in expected} == close
