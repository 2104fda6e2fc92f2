"""Shared parts: the shipped tiny model, loaded once, and small run configs."""

import gc
import json
import os
import signal

# tiny matrices gain nothing from threads, which spin where two workers share two cores;
# set, not defaulted: workers inherit what the process that starts them has set
os.environ["OMP_NUM_THREADS"] = "1"

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from duet.configs.load import load_config
from duet.configs.policy_schema import SamplingConfig, SdeConfig
from duet.configs.rows import load_rows
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline
from duet.train import loop
from tests.judge_endpoint import Endpoint

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "configs" / "tiny" / "model"
CLIP = f"local-dir:{ROOT}/configs/tiny/judges/clip"
# of the decoder's small runs: the shipped ones read with OCR, a third of such a run
LIGHT = (
    f"rewards=[{{name: fidelity, args: {{model: '{CLIP}', pretrained: null}}}},"
    " {name: duet.train.tiny.hackable.Sharpness, weight: 0.5}]"
)
# of the AR's: an edit writes 6 tokens, a text prompt 253; of so few a sharp policy writes the same
SHORT = ("data.train=configs/tiny/prompts/edits_train.jsonl", "sampling.temperature=2")
SAMPLING = SamplingConfig(height=64, width=96, num_inference_steps=6)
SIZE = Size(64, 96)


# files that take long, the longest first, most of it in processes of their own: begun last, one
# of two workers would wait for the other
_LONG = (
    "test_plan", "test_engines", "test_train", "test_precision", "test_processes",
    "test_shared_work", "test_commands", "test_real_size", "test_selection", "test_memory",
    "test_tuning", "test_turns", "test_priors", "test_damage", "test_endings", "test_spread",
)  # fmt: skip


def pytest_configure(config):
    # xdist would begin the files of most tests first, and those of few long ones last
    config.option.loadscopereorder = False
    # a shell's background job ignores it, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))


def pytest_collection_finish():
    gc.freeze()  # the libraries stay: no collection walks them again


def train(config: RunConfig) -> Path:
    """A run in this process, as if none had been before it."""
    AcceleratorState._reset_state(True)
    return loop.train(config)


def held_out_edits(count: int) -> list[dict]:
    """Rows for a file anywhere: of their pictures the sources alone."""
    folder = ROOT / "configs" / "tiny" / "prompts"
    rows = map(json.loads, (folder / "edits_eval.jsonl").read_text().splitlines()[:count])
    kept = ("prompt", "edit")
    return [
        {name: row[name] for name in kept} | {"sources": [str(folder / s) for s in row["sources"]]}
        for row in rows
    ]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint, or of a part's folder in one of both."""
    return load_file(next((folder / "adapter").glob("*.safetensors")))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """The shipped configs name their files from the repository's root."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipeline():
    """The tiny model without adapters: tests that add one load their own."""
    return load_pipeline(str(MODEL))


@pytest.fixture
def engine(pipeline):
    return Engine(pipeline, SAMPLING, SdeConfig(noise_level=0.8), progress=False)


@pytest.fixture(scope="session")
def rows():
    return load_rows(ROOT / "configs" / "tiny" / "prompts" / "eval.jsonl")


@pytest.fixture
def endpoint(monkeypatch):
    """What a judge asks; it is asked again without a pause."""
    monkeypatch.setattr("duet.rewards.judge.PAUSE_SECONDS", 0)
    with Endpoint() as served:
        yield served


def small_config(output: Path, stage: str, *overrides: str) -> RunConfig:
    """A shipped config, made a run of seconds."""
    small = [
        f"output_dir={output}",
        "rollout.prompts_per_step=2",
        "rollout.num_generations=4",
        "optim.per_device_train_batch_size=4",
        "optim.gradient_accumulation_steps=2",
        "grpo.num_iterations=1",
        "sampling.num_inference_steps=6",
        "train.trackers=[]",
        "train.save_steps=1",
        "train.max_steps=2",
        *([LIGHT] if stage == "decoder" else SHORT),
    ]
    return load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", [*small, *overrides])


@pytest.fixture
def small_run(tmp_path):
    """`small_config` of this test's own folder."""
    return partial(small_config, tmp_path / "run")
