"""Full tuning and averages: what trains, what it is compared with, what is saved and read back."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import GlmImageTransformer2DModel
from safetensors.torch import load_file
from transformers import GlmImageForConditionalGeneration

from duet.configs.load import load_config
from duet.configs.row import Row
from duet.configs.schema import Arithmetic, AverageConfig, LoraConfig, OptimConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter
from duet.inference.engine import Engine
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.trained import averaged, load_trained
from duet.train.policy import Policy
from duet.train.prompts import Group
from duet.train.recompute import recompute_blocks
from duet.train.setup import prepare
from duet.train.stages import STAGES as MADE
from duet.train.stages import Stage
from duet.train.tiny.gaps import SHIPPED
from duet.train.tuning import Full, Lora, Tuning
from tests.conftest import MODEL, ROOT, SAMPLING, SIZE, train

STAGES = ["ar", "decoder"]
STOCK = {"ar": GlmImageForConditionalGeneration, "decoder": GlmImageTransformer2DModel}
FULL = [
    "tuning=full",
    "grpo.beta=0.01",
    "optim.learning_rate=1e-5",
    "optim.lr_scheduler_type=constant",
    "average={decay: 0.5, start: 0}",
]
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1e9)
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
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    return Policy(accelerator, module, info_of(stage, tuning), OPTIM, 9, average)


@dataclass(frozen=True)
class Bench:
    """Rollouts of the base, to be scored by whatever module."""

    stage: Stage
    rollouts: list[Rollout]

    def logprobs(self, module: torch.nn.Module) -> torch.Tensor:
        return self.stage.score(self.rollouts, module).logprobs

    def loss(self, module: torch.nn.Module) -> torch.Tensor:
        signs = torch.tensor([[1.0], [-0.5]])
        return (signs * self.logprobs(module)).mean()


@pytest.fixture(scope="module", params=STAGES)
def bench(request, pipeline):
    config = load_config(ROOT / "configs" / "tiny" / f"{request.param}.yaml")
    made = MADE[request.param](Engine(pipeline, SAMPLING, config.sde, progress=False), config)
    row = Row({"prompt": PROMPT})
    with torch.no_grad():
        rollouts = made.engine.rollout(made.requests([Group(0, row, (1, 2), 3)]), range(1, 3))
    return Bench(made, rollouts)


def update(policy: Policy, bench: Bench) -> None:
    with policy.accelerator.accumulate(policy.module), policy.training() as module:
        loss = bench.loss(module)
        policy.accelerator.backward(loss)
        assert policy.step(loss).made


def values(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.trained]


TUNINGS = pytest.mark.parametrize("tuning", ["lora", "full"])


@TUNINGS
def test_the_reference_is_what_the_run_began_with(bench, pipeline, tuning):
    part = bench.stage.part
    policy = policy_of(part.name, tuning)
    base = bench.logprobs(part.module(pipeline))
    for _ in range(2):  # the first moves B of an adapter alone
        update(policy, bench)
    own, moved = values(policy), bench.stage.score(bench.rollouts, policy.inner)
    with policy.reference() as module:
        reference = bench.stage.score(bench.rollouts, module)
        assert not reference.logprobs.requires_grad
    assert torch.equal(reference.logprobs, base), "to the bit"
    assert float(bench.stage.kl(moved, reference).detach().mean()) > 1e-8
    assert all(map(torch.equal, own, policy.trained)), "swapped back"


@TUNINGS
def test_a_graph_that_stands_open_does_not_go_backward_through_a_swap(bench, tuning):
    """Values are back, but what autograd would read meanwhile is not known to it."""
    policy = policy_of(bench.stage.part.name, tuning, AverageConfig())
    loss = bench.loss(policy.module)
    with policy.averaged():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_trained_parameter_gets_a_gradient(bench):
    part = bench.stage.part
    policy = policy_of(part.name, "full")
    bench.loss(policy.module).backward()
    for name, parameter in policy.inner.named_parameters():
        idle = name.startswith(tuple(f"{i}." for i in part.idle))
        assert parameter.requires_grad == (not idle) == (parameter.grad is not None), name
        assert idle or parameter.grad.abs().max() > 0, name


def test_a_full_update_is_adamws_of_the_plain_modules_gradients(bench):
    """arXiv 1711.05101: the first step is lr (g / (|g| + eps) + decay w)."""
    part = bench.stage.part
    plain = part.module(load_pipeline(str(MODEL))).requires_grad_(True)
    bench.loss(plain).backward()
    policy = policy_of(part.name, "full")
    update(policy, bench)
    made = dict(policy.inner.named_parameters())
    for name, parameter in plain.named_parameters():
        if (gradient := parameter.grad) is not None:
            by = gradient / (gradient.abs() + OPTIM.adam_epsilon) + OPTIM.weight_decay * parameter
            expected = parameter - OPTIM.learning_rate * by
            assert torch.allclose(made[name], expected, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(made[name], parameter), name


def test_blocks_computed_again_give_the_same_gradients(bench):
    policy = policy_of(bench.stage.part.name, "full")
    found = []
    for again in (False, True):
        if again:
            recompute_blocks(policy.inner, bench.stage.part.block)
        policy.optimizer.zero_grad()
        bench.loss(policy.module).backward()
        found.append([p.grad.clone() for p in policy.trained])
    assert all(map(torch.equal, *found))


@TUNINGS
def test_the_average_is_the_moving_average(bench, tuning):
    policy = policy_of(bench.stage.part.name, tuning, AverageConfig(decay=0.25, start=1))
    assert all(map(torch.equal, values(policy), policy.average.values))
    expected = []
    for decay in (0, 0, 2 / 11, 3 / 12 - 1e-9, 0.25):  # two of the start, n / (9 + n), the decay
        update(policy, bench)
        now = values(policy)
        before = expected or now
        expected = [decay * e + (1 - decay) * v for e, v in zip(before, now, strict=True)]
        for average, wanted in zip(policy.average.values, expected, strict=True):
            assert torch.allclose(average, wanted, rtol=0, atol=1e-6)
    own = values(policy)
    with policy.averaged():
        assert all(map(torch.equal, policy.trained, policy.average.values))
    assert all(map(torch.equal, own, policy.trained))


def test_a_skipped_update_is_not_averaged(bench):
    policy = policy_of(bench.stage.part.name, "lora", AverageConfig())
    update(policy, bench)
    before = [v.clone() for v in policy.average.values]
    with policy.accelerator.accumulate(policy.module):
        loss = bench.loss(policy.module) * torch.nan
        policy.accelerator.backward(loss)
        assert not policy.step(loss).made
    assert all(map(torch.equal, before, policy.average.values))
    assert policy.average.updates == 1


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


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Full weights of each stage: those of the base."""
    pipeline, folders = load_pipeline(str(MODEL)), {}
    for stage, part in PARTS.items():
        folders[stage] = tmp_path_factory.mktemp(stage) / "weights"
        info_of(stage, "full").write(part.module(pipeline), folders[stage])
    return folders


@pytest.fixture(scope="module")
def bare():
    """A model that none of the weights here come to stand on."""
    return load_pipeline(str(MODEL))


def tensors(change):
    """Other tensors: what `change` makes of all, by name."""

    def damage(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        changed = change(dict(sorted(load_file(path).items())))
        save_file({n: t.contiguous() for n, t in changed.items()}, path, {"format": "pt"})

    return damage


def first(change):
    """Another first tensor."""
    return tensors(lambda t: t | {next(iter(t)): change(t[next(iter(t))].clone())})


def info(**changed):
    def damage(folder: Path) -> None:
        told = json.loads((folder / INFO).read_text())
        (folder / INFO).write_text(json.dumps(told | changed))

    return damage


def on_file(change):
    return lambda folder: change(next(folder.glob("*.safetensors")))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# each with digests that agree with it, and what is told of it
MALFORMED = {
    "NaN": (first(lambda v: v.fill_(float("nan"))), "not finite"),
    "inf": (first(lambda v: v.fill_(float("inf"))), "not finite"),
    "a key less": (tensors(lambda t: dict(list(t.items())[1:])), "stands on one side only"),
    "a key more": (tensors(lambda t: t | {"more": torch.zeros(1)}), "stands on one side only"),
    "no keys": (tensors(lambda t: {}), "no safetensors|one side only"),
    "another shape": (first(lambda v: v[..., :-1]), "another shape"),
    "a shape that would broadcast": (first(lambda v: v[:1]), "another shape"),
    "bfloat16": (tensors(lambda t: {n: v.bfloat16() for n, v in t.items()}), "not float32"),
    "a name in two files": (
        on_file(lambda p: shutil.copy(p, p.with_name("more.safetensors"))),
        "stands in two files",
    ),
    "cut short": (on_file(lambda p: p.write_bytes(p.read_bytes()[:-9])), "damaged"),
    "empty": (on_file(lambda p: p.write_bytes(b"")), "damaged"),
    "no weights": (on_file(Path.unlink), "no safetensors"),
    "another base": (info(base="0" * 64), "was trained on another"),
    "no stage": (info(stage="vae"), "stage = 'vae'"),
    "an adapter's key": (info(lora={"rank": 2}), "unknown key 'lora'"),
    "not JSON": (lambda f: (f / INFO).write_text("{"), "damaged"),
}
# what only the digests can tell
UNTOLD = {
    "a flipped byte": (on_file(flip), "its digest differs"),
    "another arithmetic": (info(arithmetic={"dtype": "bfloat16"}), "its digest differs"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no list of digests": (lambda f: (f / SUMS).unlink(), "SHA256SUMS cannot be read"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*MALFORMED, *UNTOLD])
def test_malformed_weights_are_refused(written, bare, stage, name, tmp_path):
    folder = Path(shutil.copytree(written[stage], tmp_path / "weights"))
    damage, told = (MALFORMED | UNTOLD)[name]
    damage(folder)
    if name in MALFORMED:
        write_digests(folder)
    with pytest.raises(UserError, match=told) as refused:
        check_trained(folder, str(MODEL))
        load_trained(bare, folder)  # names and shapes need the module
    assert len(str(refused.value).splitlines()) == 1 and str(folder) in str(refused.value)


@pytest.mark.parametrize("stage", STAGES)
def test_full_weights_know_their_part(written, bare, stage, tmp_path):
    for checkpoint in (written[stage], written[stage].parent):
        assert (
            trained_info(checkpoint).stage == check_trained(checkpoint, str(MODEL)).stage == stage
        )
    other = next(s for s in STAGES if s != stage)
    with pytest.raises(UserError, match="stands on one side only"):
        restore_weights(PARTS[other].module(bare), written[stage])
    tuned = load_pipeline(str(MODEL))
    add_adapter(PARTS[stage].module(tuned), PARTS[stage], 2, 4.0)
    with pytest.raises(UserError, match=f"the {stage} has an adapter already"):
        load_trained(tuned, written[stage])
    with pytest.raises(UserError, match="holds no average: it was trained without `average`"):
        averaged(written[stage].parent)


def test_large_weights_lie_in_several_files(written, tmp_path):
    """As stock writes them: shards and an index."""
    module, folder = load_pipeline(str(MODEL)).transformer, tmp_path / "weights"
    shutil.copytree(written["decoder"], folder)
    next(folder.glob("*.safetensors")).unlink()
    module.save_pretrained(folder, max_shard_size="3MB")
    write_digests(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_pipeline(str(MODEL), "bfloat16")
    load_trained(loaded, folder)
    assert equal(loaded.transformer.state_dict(), module.state_dict())


def test_full_tuning_in_low_precision_needs_autocast(small_run):
    with pytest.raises(UserError, match="train.mixed_precision = 'no' .* 'bf16' or 'fp16' with"):
        train(small_run("ar", "tuning=full", "model.dtype=bfloat16"))
