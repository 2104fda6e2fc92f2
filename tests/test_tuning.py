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

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.policy_schema import Arithmetic, LoraConfig
from duet.configs.row import Row
from duet.configs.schema import AverageConfig, OptimConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapter_set import joined_adapters
from duet.inference.engine import Engine
from duet.inference.generate import generate, parse
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.trained import averaged, load_trained
from duet.train.evaluation import evaluate
from duet.train.memory import phases, step_of
from duet.train.policy import Policy
from duet.train.prompts import draw_groups
from duet.train.recompute import recompute_blocks
from duet.train.setup import prepare
from duet.train.stages import STAGES as MADE
from duet.train.stages import Stage
from duet.train.tiny.gaps import SHIPPED
from duet.train.tuning import Full, Lora, Tuning
from tests.conftest import MODEL, ROOT, SAMPLING, SIZE, held_out_edits, train

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
[EDIT] = held_out_edits(1)  # of which the AR writes 6 tokens


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def tuning_of(stage: str, tuning: str) -> Tuning:
    base = base_fingerprint(str(MODEL), PARTS[stage].component)
    told = stage, str(MODEL), base, Arithmetic()
    if tuning == "full":
        return Full(Provenance(*told))
    return Lora(AdapterInfo(*told, LoraConfig(2, 4.0)))


def policy_of(stage: str, tuning: str, average: AverageConfig | None = None) -> Policy:
    AcceleratorState._reset_state(True)
    module = PARTS[stage].module(load_pipeline(str(MODEL)))
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    return Policy(accelerator, module, tuning_of(stage, tuning), OPTIM, 9, average)


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
    groups = draw_groups([Row(EDIT)], 0, 0, 1, 2)
    with torch.no_grad():
        rollouts = made.engine.rollout(made.requests(groups), range(1, 3))
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


def test_without_a_kl_no_first_weights_are_kept(small_run):
    policy = prepare(small_run("decoder", "tuning=full", "grpo.beta=0")).at(0).policy
    assert policy.initial is None
    with pytest.raises(AssertionError, match="no reference"), policy.reference():
        pass


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
    assert "full tuning, averaged with decay 0.5 (at most 0.18 in this run)" in log


@pytest.mark.parametrize("trained", [(s, "bf16") for s in STAGES], indirect=True, ids=STAGES)
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
    asked = Request(EDIT["prompt"], (1, 2), SIZE, Row(EDIT).sources)
    [rollout] = made.rollout([asked], range(1, 2))
    return [*map(np.asarray, rollout.images), rollout.tokens.logprobs, rollout.latents.logprobs]


def same(one: list, other: list) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("trained", [(s, "bf16") for s in STAGES], indirect=True, ids=STAGES)
def test_what_is_loaded_is_the_policy_in_training(trained, small_run):
    """Weights and average, pictures and log-probs, to the bit."""
    stage, precision, run = trained
    AcceleratorState._reset_state(True)
    resumed = prepare(config_of(small_run, stage, precision, run, "train.resume=latest"))
    stage_run = resumed.runs[stage]
    pipeline, autocast = stage_run.stage.engine.pipeline, stage_run.stage.engine.autocast
    policy_in_training = stage_run.policy
    with policy_in_training.sampling():
        policy = pictures(pipeline, autocast)
        with policy_in_training.averaged():
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


def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.png"))]


@pytest.mark.parametrize("trained", [("decoder", "bf16")], indirect=True, ids=["decoder"])
def test_generate_and_evaluate_take_the_average(trained, small_run, tmp_path):
    stage, precision, run = trained
    checkpoint, made = str(run / "checkpoint-2"), {}
    for name, asked in {
        "trained": [checkpoint],
        "average": [checkpoint, "--average"],
        "its folder": [f"{checkpoint}/average"],
    }.items():
        common = ["--model", str(MODEL), "--steps", "2", "--output", str(tmp_path / name)]
        list(generate(parse([*common, "--adapter", *asked]), [Row(EDIT)]))
        made[name] = files(tmp_path / name)
    assert made["average"] == made["its folder"] != made["trained"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(EDIT) + "\n")
    sharp = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"
    common = [f"data.eval={rows}", sharp, "eval.rewards=[]", "eval.images_per_prompt=1"]
    config = config_of(small_run, stage, precision, run, *common)
    models = [(checkpoint,)]
    plain = evaluate(config, models, tmp_path / "plain")
    average = evaluate(config, models, tmp_path / "averaged", average=True)
    assert plain.rows[0].scores == average.rows[0].scores, "the base"
    assert plain.rows[1].scores != average.rows[1].scores
    assert average.rows[1].checkpoints == [f"{checkpoint}/average"]


@pytest.mark.parametrize("trained", [("ar", "float32")], indirect=True, ids=["ar"])
def test_a_resume_keeps_what_is_trained_and_averaged(trained, small_run):
    stage, precision, run = trained
    for override, told in (
        ("tuning=lora", "tuning = 'lora', but checkpoint .* was trained with 'full'"),
        ("average=null", "average = None, but checkpoint .* was trained with {'decay': 0.5"),
        ("average.decay=0.9", "average.decay = 0.9, but checkpoint .* was trained with 0.5"),
        ("optim.weight_decay=0.1", "optim.weight_decay = 0.1, but"),
    ):
        with pytest.raises(UserError, match=told):
            train(config_of(small_run, stage, precision, run, "train.resume=latest", override))


def test_each_turn_has_its_own_tuning_and_average(tmp_path):
    """The AR whole and averaged, the decoder by LoRA; resumed at the border, to the bit."""
    sharp = "rewards: [{name: duet.train.tiny.hackable.Sharpness}]"
    common = [
        f"stages=[{{part: ar, steps: 1, {sharp}, tuning: full, average: {{decay: 0.5}},"
        f" optim: {{learning_rate: 1.0e-5}}}}, {{part: decoder, steps: 1, {sharp}}}]",
        "rollout.prompts_per_step=1", "rollout.num_generations=2", "rollout.batch_size=2",
        "optim.per_device_train_batch_size=2", "sampling.num_inference_steps=4",
        "optim.lr_scheduler_type=constant", "train.trackers=[]", "train.save_steps=1",
    ]  # fmt: skip

    def ended(name: str, *overrides: str) -> Path:
        config = ROOT / "configs" / "tiny" / "both.yaml"
        return train(load_config(config, [*common, f"output_dir={tmp_path / name}", *overrides]))

    whole = ended("whole", "train.max_steps=3")
    ended("parts", "train.max_steps=2")
    parts = ended("parts", "train.max_steps=3", "train.resume=latest")
    for folder in ("ar/weights", "ar/average", "decoder/adapter"):
        assert equal(saved(whole / folder), saved(parts / folder)), folder
    assert not (whole / "decoder" / "average").exists()
    loaded = load_pipeline(str(MODEL))
    for part in PARTS:
        assert load_trained(loaded, whole / part).stage == part
    with pytest.raises(UserError, match="decoder' holds no average"):
        joined_adapters("--adapter", [str(whole)], str(MODEL), average=True)


@pytest.mark.parametrize(("stage", "average"), [("ar", None), ("decoder", "{decay: 0.5}")])
def test_the_plan_counts_all_weights_and_the_average(stage, average):
    part = PARTS[stage]
    module = part.module(load_pipeline(str(MODEL)))
    idle = sum(p.nbytes for n, p in module.named_parameters() if n.startswith(part.idle or ("-",)))
    whole = sum(p.nbytes for p in module.parameters()) - idle
    given = ["tuning=full", "model.offload=phase", f"average={average or 'null'}", "grpo.beta=0.1"]
    config = load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", given)
    held = phases(config, step_of(config, MODEL, 1), 1)[-1].held  # of the optimizer's step
    assert held["trained weights"] == held["gradients"] == whole
    assert held["optimizer state"] == 2 * whole
    assert held.get("copies of the trained weights", 0) == (whole if average else 0)
    buffers = sum(b.nbytes for b in module.buffers())
    assert held.get("frozen weights", 0) == idle + buffers
