"""Runs that begin on trained adapters or weights: what they begin with, compare with, remember."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.policy_schema import Arithmetic, LoraConfig
from duet.configs.rows import load_rows
from duet.configs.schema import OptimConfig, RunConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import add_adapter, save_adapter
from duet.inference.engine import Engine
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.request import Request
from duet.inference.trained import load_trained, trained_folder
from duet.inference.weights import save_weights
from duet.train import prior_making, setup
from duet.train.evaluation import evaluate
from duet.train.given import given
from duet.train.policy import Policy
from duet.train.prior_cache import PriorCache
from duet.train.prompts import fixed_seeds
from duet.train.setup import prepare
from duet.train.tuning import tuning_of
from tests.conftest import MODEL, ROOT, SHORT, SIZE, adapter_weights, train

TINY = ROOT / "configs" / "tiny"
STAGES = list(PARTS)
LORA = LoraConfig(2, 4.0)
BOTH = (
    "stages=[{part: ar, steps: 1, optim: {learning_rate: 1.0e-3}},"
    " {part: decoder, steps: 1, sde: {window_size: 1}}]"
)
STEPS = 4  # AR, decoder, AR, decoder


def write(stage: str, tuning: str, folder: Path) -> str:
    """A checkpoint of the part, as far from its base as training could bring it."""
    part = PARTS[stage]
    module = part.module(load_pipeline(str(MODEL)))
    told = stage, str(MODEL), base_fingerprint(str(MODEL), part.component), Arithmetic()
    if tuning == "lora":
        add_adapter(module, part, LORA.rank, LORA.alpha)
    for name, parameter in module.named_parameters():
        if "lora_B" in name or tuning == "full":
            parameter.data += 0.02 * torch.randn_like(parameter)
    if tuning == "lora":
        save_adapter(module, folder / "adapter", AdapterInfo(*told, LORA))
    else:
        save_weights(module, folder / "weights", Provenance(*told))
    return str(folder)


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> dict[str, str]:
    """Folders: a checkpoint of `both` with an adapter each, and one of full weights each."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("started")
    for stage in STAGES:
        write(stage, "lora", folder / "both" / stage)
    full = {f"full {stage}": write(stage, "full", folder / f"full-{stage}") for stage in STAGES}
    each = {stage: str(folder / "both" / stage) for stage in STAGES}
    return {"both": str(folder / "both"), **each, **full}


def config_of(name: str, *overrides: str) -> RunConfig:
    small = [
        *SHORT, "rollout.prompts_per_step=1", "rollout.num_generations=2", "rollout.batch_size=2",
        "optim.per_device_train_batch_size=2", "sampling.num_inference_steps=4",
        "optim.lr_scheduler_type=constant", "grpo.beta=0.05", "train.trackers=[]",
        "lora={rank: 2, alpha: 4}", "sde.window_start_max=0", "train.save_steps=1", "rollout.priors=sampled",
        "rewards=[{name: duet.train.tiny.hackable.Sharpness}]", "eval.rewards=[]",
    ]  # fmt: skip
    return load_config(TINY / f"{name}.yaml", [*small, *overrides])


def beginning(*checkpoints: str) -> str:
    return f"model.adapters=[{', '.join(checkpoints)}]"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def refusal(work, *args) -> str:
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError) as error:
        work(*args)
    return str(error.value)


@pytest.fixture(scope="module")
def run(started, tmp_path_factory) -> Path:
    """Of both parts in turns, each from its own."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [BOTH, beginning(started["both"]), f"train.max_steps={STEPS}"]
    return train(config_of("both", *overrides, f"output_dir={folder}")).parent


def test_a_run_goes_on_from_what_it_is_given_and_compares_with_that(run, started):
    steps = metrics(run)
    assert [step["kl"] for step in steps[:2]] == [0, 0], "nothing has moved"
    assert all(step["ratio/mean"] == pytest.approx(1, abs=1e-5) for step in steps[:2])
    assert all(step["kl"] > 1e-9 for step in steps[2:])
    for stage, step, rate in (("ar", 1, 1e-3), ("decoder", 2, 1e-3)):
        before, after = (
            adapter_weights(Path(folder))
            for folder in (started[stage], run / f"checkpoint-{step}" / stage)
        )
        moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in before])
        assert 0 < moved.max() <= 1.01 * rate, "an update of AdamW"


@pytest.mark.parametrize("step", [1, 2])
def test_a_resume_keeps_the_start_as_its_reference(run, started, tmp_path, step):
    overrides = [BOTH, beginning(started["both"]), f"train.max_steps={STEPS}"]
    resumed = [f"output_dir={tmp_path}", f"train.resume={run}/checkpoint-{step}"]
    reached = train(config_of("both", *overrides, *resumed, "train.save_steps=99"))
    for stage in STAGES:
        whole = run / f"checkpoint-{STEPS}" / stage
        assert equal(adapter_weights(reached / stage), adapter_weights(whole))
    kls = [[(step["step"], step["kl"]) for step in metrics(r)] for r in (run, tmp_path)]
    assert kls[0] == kls[1]


def test_a_resume_with_another_start_is_refused(run, started, tmp_path):
    shutil.copytree(started["both"], tmp_path / "moved")
    write("decoder", "lora", tmp_path / "other")
    goes_on = [
        f"output_dir={tmp_path}/run",
        f"train.resume={run}/checkpoint-2",
        "train.max_steps=4",
    ]

    def told(*checkpoints) -> str:
        overrides = [BOTH, *goes_on, beginning(*map(str, checkpoints))]
        return refusal(prepare, config_of("both", *overrides))

    assert "gives the ar another beginning than checkpoint" in told(started["decoder"])
    assert "gives the ar another beginning than checkpoint" in told()
    line = told(started["ar"], tmp_path / "other")
    assert "gives the decoder another beginning than checkpoint" in line
    AcceleratorState._reset_state(True)
    prepare(config_of("both", BOTH, *goes_on, beginning(f"{tmp_path}/moved")))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_trained_part_begins_with_what_it_is_given(stage, tuning, started):
    AcceleratorState._reset_state(True)
    part, folder = PARTS[stage], started[stage if tuning == "lora" else f"full {stage}"]
    module = part.module(load_pipeline(str(MODEL)))
    base = base_fingerprint(str(MODEL), part.component)
    made = tuning_of(config_of(stage, f"tuning={tuning}"), base, folder)
    policy = Policy(Accelerator(cpu=True), module, made, OptimConfig(), 9)
    held = load_file(next(trained_folder(folder).glob("*.safetensors")))

    def same() -> bool:
        now = {
            name.replace(".default", ""): value
            for name, value in module.state_dict().items()
            if tuning == "full" or "lora_" in name
        }
        found = {name.removeprefix(part.prefix): value for name, value in held.items()}
        tied = now.keys() - found.keys()  # stock writes them once
        return all(torch.equal(value, now[name]) for name, value in found.items()) and not tied

    assert same()
    for parameter in policy.trained:
        parameter.data += 1
    assert not same()
    with policy.reference():
        assert same(), "the first values are what it is compared with"
    assert not same()


def test_an_untrained_part_has_its_own_frozen(started, tmp_path, monkeypatch):
    """And it is there when what training forwards pass is judged."""
    AcceleratorState._reset_state(True)
    overrides = [beginning(started["full ar"]), f"output_dir={tmp_path}"]
    run = prepare(config_of("decoder", *overrides)).runs["decoder"]
    ar = run.stage.engine.pipeline.vision_language_encoder
    held = load_file(next(Path(started["full ar"]).rglob("*.safetensors")))
    assert equal(dict(ar.state_dict()), held)
    assert not any(p.requires_grad for p in ar.parameters())
    assert run.policy.initial is None, "the trained part was given nothing"


@pytest.mark.parametrize(
    ("stage", "overrides", "given_to", "line"),
    [
        ("ar", ["lora.rank=4"], "ar", "lora.rank = 4 of the ar, but '.*ar' .* has 2: give that"),
        ("ar", ["lora.alpha=8"], "both", r"lora.alpha = 8.0 of the ar, but .* has 4.0"),
        ("decoder", ["lora.target_modules=[to_q]"], "decoder",
         r"lora.target_modules = \['to_q'\] of the decoder, but .* has \['ff.net.0.proj', "),
        ("decoder", ["tuning=full"], "decoder", "tuning = 'full' of the decoder, but .* has 'lora'"),
        ("ar", [], "full ar", "tuning = 'lora' of the ar, but .* has 'full': give that"),
        ("ar", ["model.dtype=bfloat16"], "decoder", "model.dtype = 'bfloat16' and .* trained with 'float32'"),
        ("decoder", ["train.mixed_precision=bf16"], "ar", "train.mixed_precision = 'bf16', but .*/ar"),
        ("ar", [], "both, decoder", "model.adapters .* joins adapters of ar and decoder and decoder"),
        ("ar", [], "no-such", "checkpoint '.*no-such' is missing or damaged"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_weights_are_read(
    stage, overrides, given_to, line, started, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup, "load_pipeline", None)
    folders = [started.get(name, f"/{name}") for name in given_to.split(", ")]
    common = [f"output_dir={tmp_path}", beginning(*folders), *overrides]
    told = refusal(prepare, config_of(stage, *common))
    assert re.search(line, told), told


def test_what_an_untrained_part_is_given_need_not_be_as_the_trained_one(started):
    config = config_of(
        "decoder", beginning(started["both"].replace("both", "both/ar")), "lora.rank=4"
    )
    assert set(given(config)) == {"ar"}


def test_cached_priors_are_those_of_the_ar_that_the_run_begins_with(started, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((TINY / "prompts" / "train.jsonl").read_text().splitlines()[0] + "\n")
    shutil.copytree(TINY / "prompts" / "train", tmp_path / "train", dirs_exist_ok=True)
    common = [
        f"data.train={rows}", f"rollout.prior_cache={tmp_path}/cache", f"output_dir={tmp_path}/run",
        "rollout.priors_per_prompt=1",
    ]  # fmt: skip
    config = config_of("decoder", *common, beginning(started["both"]))
    prior_making.fill_cache(config)
    pipeline = load_pipeline(str(MODEL))
    engine = Engine.of(pipeline, config, False)
    [row] = load_rows(rows)
    asked = [Request(row.prompt, (fixed_seeds(1, config.seed, 0)[0],), SIZE)]
    bare = engine.priors(asked)[0]
    load_trained(pipeline, started["ar"])
    cached = PriorCache.of(config).read(0).tokens
    assert torch.equal(cached, engine.priors(asked)[0]) and not torch.equal(cached, bare)
    AcceleratorState._reset_state(True)
    prepare(config_of("decoder", *common, beginning(started["ar"])))
    for others in ([], [started["decoder"]]):
        line = refusal(prepare, config_of("decoder", *common, beginning(*others)))
        assert f"is stale: the AR of model.adapters = {others} is another" in line


def test_an_evaluation_begins_where_the_run_does(started, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a red card with the white word \\"CAT\\""}\n')
    other = write("decoder", "lora", tmp_path / "other")

    def of(name: str, adapters: list[str], *models: tuple[str, ...]):
        common = [f"data.eval={rows}", "eval.images_per_prompt=1", beginning(*adapters)]
        found = evaluate(config_of("decoder", *common), models, tmp_path / name)
        return [(set(row.checkpoints), row.scores) for row in found.rows]

    ar, decoder = started["ar"], started["decoder"]
    base, joined = of("begun", [ar, decoder], (other,))
    assert [base[0], joined[0]] == [{ar, decoder}, {ar, other}]
    _, same_base, same_joined = of("plain", [], (ar, decoder), (ar, other))
    assert base == same_base and joined == same_joined
