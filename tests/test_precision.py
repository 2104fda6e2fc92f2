"""The shipped precision: bfloat16 trains, with the real configs' settings, and is one policy."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import GenerationConfig

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.policy_schema import Arithmetic, LoraConfig
from duet.configs.row import Row
from duet.configs.schema import OptimConfig
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapters import (
    add_adapter,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from duet.inference.engine import Engine, autocast_dtype
from duet.inference.generate import choose_arithmetic, generate, parse
from duet.inference.model import base_fingerprint, load_pipeline
from duet.inference.outline import STOCK_GENERATION, read_outline
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.train import gate
from duet.train.evaluation import evaluate
from duet.train.policy import Policy
from duet.train.setup import prepare
from duet.train.stages import DecoderStage
from duet.train.tiny.gaps import SHIPPED, make_bench, rescored, walk
from duet.train.tuning import Lora
from tests.conftest import CLIP, MODEL, ROOT, SAMPLING, SIZE, adapter_weights, train

STAGES = ["ar", "decoder"]
BF16 = Arithmetic("bfloat16", "bf16")
# what must differ at tiny size, and nothing else: files, size, steps, rewards, how long
TINY = [
    f"model.path={MODEL}",
    "data.train=configs/tiny/prompts/train.jsonl",
    "data.eval=configs/tiny/prompts/eval.jsonl",
    "sampling.height=64",
    "sampling.width=96",
    "sampling.num_inference_steps=9",
    "rollout.prompts_per_step=2",
    f"rewards=[{{name: fidelity, args: {{model: '{CLIP}', pretrained: null}}}}]",
    "train.max_steps=2",
    "train.trackers=[]",
]


def info_of(stage: str, arithmetic: Arithmetic, rank: int, alpha: float) -> AdapterInfo:
    base = base_fingerprint(str(MODEL), PARTS[stage].component)
    return AdapterInfo(stage, str(MODEL), base, arithmetic, LoraConfig(rank, alpha))


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_the_real_configs_settings_train(stage, tmp_path):
    config = load_config(
        ROOT / "configs" / "glm_image" / f"{stage}.yaml", [*TINY, f"output_dir={tmp_path / 'run'}"]
    )
    assert config.arithmetic == BF16 and config.old_logprobs_of == "trainer"
    checkpoint = train(config)
    for step in metrics(tmp_path / "run"):
        # one update a rollout: the ratio is 1 to the bit, whatever sampled
        assert step["ratio/min"] == step["ratio/max"] == 1
        assert 0.95 < step["sampling/effective_sample_size"] <= 1
        assert (
            step["sampling/sampling_logp_difference/max"]
            >= step["sampling/sampling_logp_difference/mean"]
            >= 0
        )
        assert step["grad_norm"] > 0
    saved = adapter_weights(checkpoint)
    assert all(v.dtype == torch.float32 for v in saved.values())
    assert any(v.abs().max() > 0 for k, v in saved.items() if "lora_B" in k), "it must learn"


@pytest.mark.parametrize("stage", STAGES)
def test_the_ratio_starts_at_one_where_a_rollout_has_several_updates(stage):
    """The pass before the first update is the update's own forward, bit for bit."""
    small = ["rollout.prompts_per_step=2", "optim.per_device_train_batch_size=4"]
    bench = make_bench(stage, "bfloat16", *small)
    before = rescored(bench)
    for n, rollout in enumerate(bench.rollouts):
        for half in (0, 4):
            scored = bench.stage.score([rollout.select(range(half, half + 4))], bench.module)
            assert scored.logprobs.requires_grad
            assert torch.equal(scored.logprobs, before[8 * n + half : 8 * n + half + 4])


@pytest.mark.parametrize("stage", STAGES)
def test_sampler_and_trainer_log_probs_give_one_update_in_float32(small_run, stage, tmp_path):
    norms = {}
    for kind in ("sampler", "trainer"):
        folder = tmp_path / kind
        train(
            small_run(
                stage, f"grpo.old_logprobs={kind}", f"output_dir={folder}", "train.max_steps=1"
            )
        )
        (first,) = metrics(folder)
        norms[kind] = first["grad_norm"]
        assert ("sampling/sampling_logp_difference/max" in first) == (kind == "trainer")
    assert norms["sampler"] == pytest.approx(norms["trainer"], rel=1e-3)


def test_whose_log_probs_follows_the_precision(small_run):
    assert small_run("ar").old_logprobs_of == "sampler"
    assert small_run("ar", "model.dtype=bfloat16").old_logprobs_of == "trainer"
    assert small_run("ar", "train.mixed_precision=bf16").old_logprobs_of == "trainer"
    assert small_run("ar", *SHIPPED, "grpo.old_logprobs=sampler").old_logprobs_of == "sampler"


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_evaluated_is_what_training_sampled_with(stage, tmp_path):
    """One policy from its weights and its arithmetic: equal pictures and log-probs, to the bit."""
    AcceleratorState._reset_state(True)
    part = PARTS[stage]
    asked = [Request('a red card with the white word "CAT"', (1, 2), SIZE)]

    def made(pipeline, arithmetic):
        autocast = autocast_dtype(arithmetic)
        engine = Engine(pipeline, SAMPLING, autocast=autocast, progress=False)
        return engine.rollout(asked, range(1, 2))[0]

    def same(one, other) -> bool:
        pictures = zip(one.images, other.images, strict=True)
        return (
            all(np.array_equal(a, b) for a, b in pictures)
            and torch.equal(one.tokens.logprobs, other.tokens.logprobs)
            and torch.equal(one.latents.logprobs, other.latents.logprobs)
        )

    trained = load_pipeline(str(MODEL), "bfloat16")
    module = part.module(trained)
    info = info_of(stage, BF16, 8, 16.0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    policy = Policy(accelerator, module, Lora(info), OptimConfig(), updates=1)
    walk(module, 0.02)
    with policy.sampling():
        sampled = made(trained, BF16)
    policy.tuning.write(module, tmp_path)
    loaded = load_pipeline(str(MODEL), "bfloat16")
    assert load_adapter(loaded, tmp_path).arithmetic == BF16
    adapter = [p for n, p in part.module(loaded).named_parameters() if "lora_" in n]
    assert adapter and all(p.dtype == torch.float32 and not p.requires_grad for p in adapter)
    assert same(made(loaded, BF16), sampled)
    assert not same(made(loaded, Arithmetic("bfloat16")), sampled), "autocast is part of it"
    assert choose_arithmetic(None, {str(tmp_path): BF16}) == BF16
    assert choose_arithmetic("float32", {str(tmp_path): BF16}) == Arithmetic("float32")


def test_adapters_of_two_arithmetics_are_not_joined_in_silence(tmp_path):
    pipeline = load_pipeline(str(MODEL))
    folders = []
    for stage, arithmetic in (("ar", BF16), ("decoder", Arithmetic())):
        part = PARTS[stage]
        add_adapter(part.module(pipeline), part, 2, 4.0)
        folders.append(str(tmp_path / stage))
        (tmp_path / stage).mkdir()
        info = info_of(stage, arithmetic, 2, 4.0)
        save_adapter(part.module(pipeline), tmp_path / stage, info)
    with pytest.raises(UserError, match="give --dtype"):
        choose_arithmetic(None, dict(zip(folders, (BF16, Arithmetic()), strict=True)))
    config = load_config(ROOT / "configs" / "tiny" / "ar.yaml")
    with pytest.raises(UserError, match="was trained with 'bfloat16' and 'bf16'"):
        evaluate(config, [(folders[0],)], tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_low_precision_base_resumes_the_very_weights(small_run, stage, tmp_path):
    common = [*SHIPPED, "optim.lr_scheduler_type=constant", "optim.learning_rate=0.003"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_run(stage, *common, f"output_dir={whole}"))
    older = f"train.resume={whole / 'checkpoint-1'}"
    train(small_run(stage, *common, f"output_dir={parts}", older))
    expected, reached = (adapter_weights(run / "checkpoint-2") for run in (whole, parts))
    assert expected.keys() == reached.keys()
    assert all(torch.equal(value, reached[name]) for name, value in expected.items())


def test_an_adapter_of_another_shape_is_not_stretched_to_fit(tmp_path):
    """One of rank 1 would broadcast over rank 4, and half of the keys would pass."""
    pipeline = load_pipeline(str(MODEL))
    for stage, part in PARTS.items():
        folder = tmp_path / stage
        folder.mkdir()
        module = part.module(pipeline)
        add_adapter(module, part, 1, 2.0)
        save_adapter(module, folder, info_of(stage, Arithmetic(), 1, 2.0))
        other = part.module(load_pipeline(str(MODEL)))
        add_adapter(other, part, 4, 8.0)
        with pytest.raises(UserError, match="has another shape"):
            restore_adapter(other, folder)
        fewer = part.module(load_pipeline(str(MODEL)))
        add_adapter(fewer, part, 1, 2.0, part.lora_targets[:2])
        with pytest.raises(UserError, match="stands on one side only"):
            restore_adapter(fewer, folder)


@pytest.mark.parametrize(
    ("dtype", "mixed", "precision"),
    [
        ("float32", "no", "float32"),
        ("float32", "bf16", "bfloat16"),
        ("bfloat16", "no", "bfloat16"),
        ("bfloat16", "fp16", "bfloat16"),
        ("float16", "bf16", "bfloat16"),
    ],
)
def test_the_coarsest_dtype_is_the_precision(dtype, mixed, precision):
    assert Arithmetic(dtype, mixed).precision == precision


def test_half_precision_on_a_cpu_is_refused(small_run):
    with pytest.raises(UserError, match="'fp16' needs a GPU"):
        train(small_run("ar", "train.mixed_precision=fp16"))


def test_final_generation_takes_what_stock_would(pipeline):
    """The checkpoint names temperature and top_p; for top_k stock has a default of its own."""
    defaults = GenerationConfig()._get_default_generation_params()
    assert {name: defaults[name] for name in STOCK_GENERATION} == STOCK_GENERATION
    named = pipeline.vision_language_encoder.generation_config
    assert named.top_k is None and named.top_p == 0.9
    found = read_outline(str(MODEL)).defaults
    assert (found["top_k"], found["top_p"], found["height"]) == (50, 0.9, 64)


def test_generate_runs_in_the_adapters_arithmetic(tmp_path, monkeypatch):
    trained = load_pipeline(str(MODEL))
    part = PARTS["ar"]
    add_adapter(part.module(trained), part, 2, 4.0)
    save_adapter(
        part.module(trained),
        tmp_path,
        info_of("ar", BF16, 2, 4.0),
    )
    engines = []
    true = Engine.__init__

    def init(self, *args, **kwargs):
        true(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", init)
    common = [
        "--model",
        str(MODEL),
        "--adapter",
        str(tmp_path),
        "--steps",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    for told in ([], ["--dtype", "float32"]):
        assert len(list(generate(parse([*common, *told]), [Row({"prompt": "a card"})]))) == 1
    told = [(e.pipeline.transformer.dtype, e.autocast) for e in engines]
    assert told == [(torch.bfloat16, torch.bfloat16), (torch.float32, None)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_rollouts_second_update_is_off_ratio_one(small_run, stage, tmp_path):
    """Not the first rollout's alone: the old log-probs are those before each rollout's updates."""
    overrides = ["optim.gradient_accumulation_steps=1", "optim.lr_scheduler_type=constant"]
    train(small_run(stage, *SHIPPED, *overrides))
    steps = metrics(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert step["ratio/min"] < 1 < step["ratio/max"]


def test_a_run_takes_the_configs_arithmetic(small_run):
    AcceleratorState._reset_state(True)
    run = prepare(small_run("decoder", *SHIPPED)).at(0)
    assert run.stage.engine.autocast == torch.bfloat16
    assert run.accelerator.mixed_precision == "bf16"
    assert run.stage.engine.pipeline.transformer.dtype == torch.bfloat16


def test_evaluation_runs_in_the_configs_arithmetic(small_run, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a card"}) + "\n")
    engines = []
    true = Engine.__init__

    def init(self, *args, **kwargs):
        true(self, *args, **kwargs)
        engines.append((self.pipeline.transformer.dtype, self.autocast))

    monkeypatch.setattr(Engine, "__init__", init)
    reward = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"
    config = small_run("decoder", *SHIPPED, f"data.eval={rows}", reward, "eval.rewards=[]")
    evaluate(config, [], tmp_path / "report")
    assert engines == [(torch.bfloat16, torch.bfloat16)]


def test_the_trainers_ratio_is_weighed_by_the_samplers(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "check_gap", lambda *args: None)
    made, true = [], DecoderStage.sampled
    for shift in (0.0, 0.1):
        monkeypatch.setattr(DecoderStage, "sampled", lambda s, r, d=shift: true(s, r) + d)
        folder = tmp_path / str(shift)
        train(
            small_run(
                "decoder", "grpo.old_logprobs=trainer", "train.max_steps=1", f"output_dir={folder}"
            )
        )
        made.append(json.loads((folder / "metrics.jsonl").read_text()))
    assert made[1]["sampling/importance_sampling_ratio/mean"] == pytest.approx(
        math.exp(-0.1), rel=1e-3
    )
    assert made[1]["grad_norm"] == pytest.approx(math.exp(-0.1) * made[0]["grad_norm"], rel=1e-3)
