"""Training: isolation, resuming, and what is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from duet.configs.digests import write_digests
from duet.configs.errors import UserError
from duet.configs.policy_schema import SamplingConfig, SdeConfig
from duet.configs.row import Row
from duet.inference.adapters import add_adapter, load_adapter
from duet.inference.engine import Engine
from duet.inference.model import load_pipeline
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.train.checkpoint import complete_checkpoints
from duet.train.prompts import draw_groups, shard
from duet.train.setup import prepare
from duet.train.stages import STAGES
from tests.conftest import (
    MODEL,
    ROOT,
    SAMPLING,
    SIZE,
    adapter_weights,
    small_config,
    train,
)

STAGE_NAMES = ["ar", "decoder"]


def moments(run: Path) -> torch.Tensor:
    """Adam's first moments after the first rollout, one vector."""
    state = torch.load(run / "checkpoint-1" / "state" / "optimizer.bin", weights_only=True)["state"]
    return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollout_of(stage: str, engine: Engine, config, rows):
    groups = draw_groups(rows, 3, 0, 2, 3)
    made = STAGES[stage](engine, config)
    return engine.rollout(made.requests(groups), made.window(0))


def spread(images) -> int:
    first = np.asarray(images[0], dtype=int)
    return max(int(np.abs(np.asarray(i, dtype=int) - first).max()) for i in images[1:])


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("reference_images", [True, False])
def test_only_the_policy_makes_a_group_differ(pipeline, rows, small_run, stage, reference_images):
    """With a policy that cannot vary, all images of a group are equal; else they are not."""
    rows = rows if reference_images else [Row({"prompt": r["prompt"]}) for r in rows]
    still = {
        "ar": (replace(SAMPLING, temperature=0.0), SdeConfig()),
        "decoder": (SAMPLING, SdeConfig(noise_level=0.0)),
    }
    engine = Engine(pipeline, *still[stage], progress=False)
    rollouts = rollout_of(stage, engine, small_run(stage), rows)
    assert [spread(r.images) for r in rollouts] == [0, 0]
    engine = Engine(pipeline, SAMPLING, SdeConfig(noise_level=0.8), progress=False)
    rollouts = rollout_of(stage, engine, small_run(stage), rows)
    assert min(spread(r.images) for r in rollouts) > 0


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_only_the_adapter_of_the_trained_module_learns(stage):
    pipeline = load_pipeline(str(MODEL))
    part = PARTS[stage]
    add_adapter(part.module(pipeline), part, 4, 8.0)
    for name in ("vision_language_encoder", "transformer", "vae", "text_encoder"):
        learning = [n for n, p in getattr(pipeline, name).named_parameters() if p.requires_grad]
        assert all("lora_" in n and "visual" not in n for n in learning)
        assert bool(learning) == (name == part.component)


def test_groups_are_a_function_of_seed_and_step():
    rows = [{"prompt": str(i)} for i in range(5)]
    walked = [g for step in range(5) for g in draw_groups(rows, 1, step, 2, 3)]
    assert [g.id for g in walked] == list(range(10))
    assert sorted(g.row["prompt"] for g in walked[:5]) == list("01234")  # every row once an epoch
    assert len({s for g in walked for s in g.seeds}) == 30
    assert draw_groups(rows, 1, 3, 2, 3) == walked[6:8] != draw_groups(rows, 2, 3, 2, 3)
    assert sorted(g.id for r in range(2) for g in shard(walked, r, 2)) == list(range(10))


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_resumed_run_ends_in_the_very_same_weights(small_run, stage, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["grpo.beta=0.01", "optim.warmup_steps=4", "train.max_steps=3"]
    train(small_run(stage, *common, f"output_dir={whole}"))
    # as a kill in the third step leaves it; a partial folder, and a whole one of no name
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("checkpoint-3"))
    (parts / ".checkpoint-9.partial").mkdir()
    (parts / "checkpoint-7").mkdir()
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (parts / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "rew')
    train(small_run(stage, *common, f"output_dir={parts}", "train.resume=latest"))
    expected, reached, before = (
        adapter_weights(whole / "checkpoint-3"),
        adapter_weights(parts / "checkpoint-3"),
        adapter_weights(parts / "checkpoint-2"),
    )
    assert expected.keys() == reached.keys()
    assert all(torch.equal(expected[k], reached[k]) for k in expected)
    assert any(not torch.equal(before[k], reached[k]) for k in reached), "the last step must learn"
    assert [m["step"] for m in metrics(parts)] == [1, 2, 3]
    assert metrics(parts)[2]["reward"] == metrics(whole)[2]["reward"]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_several_passes_make_several_updates(small_run, stage, tmp_path):
    """The second pass over a rollout is off ratio 1."""
    train(small_run(stage, "train.max_steps=1", "grpo.num_iterations=2"))
    run = tmp_path / "run"
    assert metrics(run)[0]["ratio/max"] - metrics(run)[0]["ratio/min"] > 1e-4
    state = torch.load(run / "checkpoint-1" / "state" / "optimizer.bin", weights_only=True)["state"]
    assert {int(s["step"]) for s in state.values()} == {2}


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("ar", ["grpo.importance_sampling_level=sequence"]),
        ("decoder", ["grpo.importance_sampling_level=sequence"]),
        ("ar", ["grpo.loss_type=dr_grpo"]),
        ("decoder", ["grpo.loss_type=dapo"]),  # of the AR in the next test
        ("decoder", ["grpo.scale_rewards=none", "grpo.multi_objective_aggregation=sum_then_normalize"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].partition(".")[2],
)  # fmt: skip
def test_every_objective_learns_in_the_loop(small_run, stage, overrides, tmp_path):
    """Two updates a rollout: the second one's ratio is off 1, by the objective's own formula."""
    updates = ["optim.gradient_accumulation_steps=1", "optim.lr_scheduler_type=constant"]
    train(small_run(stage, *updates, *overrides))
    for step in metrics(tmp_path / "run"):
        assert step["grad_norm"] > 0
        assert step["ratio/max"] - step["ratio/min"] > 1e-6
    if "grpo.importance_sampling_level=sequence" in overrides:
        assert metrics(tmp_path / "run")[0]["ratio/max"] < 1.05, "a mean over actions is tame"
    before, after = (
        adapter_weights(tmp_path / "run" / "checkpoint-1"),
        adapter_weights(tmp_path / "run" / "checkpoint-2"),
    )
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_dapo_is_grpo_where_all_samples_are_of_one_length(small_run, tmp_path):
    norms = []
    for kind in ("grpo", "dapo"):
        folder = tmp_path / kind
        train(
            small_run("ar", f"grpo.loss_type={kind}", f"output_dir={folder}", "train.max_steps=1")
        )
        norms.append(metrics(folder)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_all_priors_of_a_step_are_sampled_in_one_call(pipeline, small_run, monkeypatch):
    config = small_run("decoder", "rollout.batch_size=4")
    engine = Engine(pipeline, config.sampling, config.sde, 4, progress=False)
    calls = []
    true = Engine.priors
    monkeypatch.setattr(
        Engine, "priors", lambda self, asked: calls.append(len(asked)) or true(self, asked)
    )
    told = 'a red card with the white word "{}"'
    rows = [Row({"prompt": told.format(word)}) for word in ("CAT", "PEN", "ALONE")]
    groups = draw_groups(rows, 0, 0, 3, 2)
    requests = STAGES["decoder"](engine, config).requests(groups)
    assert calls == [3] and all(r.prior.shape == (6,) for r in requests)


def test_a_linear_schedule_ends_at_zero(small_run, tmp_path):
    train(small_run("decoder", "optim.lr_scheduler_type=linear", "optim.learning_rate=1e-3"))
    # one update a rollout, two rollouts; logged after the update
    assert [m["learning_rate"] for m in metrics(tmp_path / "run")] == pytest.approx([5e-4, 0])


def test_what_a_step_writes(small_run, tmp_path):
    train(small_run("ar", "grpo.beta=0.01", "train.trackers=[tensorboard]"))
    run = tmp_path / "run"
    first, second = metrics(run)
    assert {
        "reward",
        "reward_std",
        "rewards/alignment/mean",
        "rewards/aesthetic/mean",
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "frac_reward_zero_std",
        "ratio/mean",
        "ratio/min",
        "ratio/max",
        "rollout/seconds",
        "reward/seconds",
        "update/seconds",
        "rollout/samples_per_second",
        "loss",
        "grad_norm",
        "learning_rate",
    } <= first.keys()
    assert first["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 0
    assert (run / "images" / "step-1.png").is_file()
    assert list(run.rglob("events.out.tfevents*"))
    checkpoint = complete_checkpoints(run)[-1]
    assert {p.name for p in checkpoint.iterdir()} == {
        "adapter",
        "state",
        "trainer_state.json",
        "SHA256SUMS",
    }
    state = {p.name for p in (checkpoint / "state").iterdir()}
    assert state == {"optimizer.bin", "scheduler.bin", "random_states_0.pkl"}, "no frozen base"


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_stock_libraries_load_the_adapter(small_run, stage, tmp_path):
    """The checkpoint's adapter gives the trained picture through transformers' and diffusers' own calls."""
    train(small_run(stage, "train.max_steps=1", "optim.learning_rate=0.01"))
    folder = str(tmp_path / "run" / "checkpoint-1" / "adapter")
    stock = load_pipeline(str(MODEL))
    if stage == "ar":
        stock.vision_language_encoder.load_adapter(folder)
    else:
        stock.transformer.load_lora_adapter(
            folder, prefix=None, weight_name="pytorch_lora_weights.safetensors"
        )
    ours, base = load_pipeline(str(MODEL)), load_pipeline(str(MODEL))
    assert load_adapter(ours, tmp_path / "run" / "checkpoint-1").stage == stage
    asked = [Request('a red card with the white word "CAT"', (1, 2), SIZE)]
    sampling = SamplingConfig(64, 96, num_inference_steps=4)
    pictures = [
        np.stack(
            [
                np.asarray(i, dtype=int)
                for i in Engine(p, sampling, progress=False).rollout(asked)[0].images
            ]
        )
        for p in (stock, ours, base)
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[1], pictures[2]), "the adapter must change the picture"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.per_device_train_batch_size=3", "do not divide into updates"),
        ("lora.target_modules=[nothing]", "fits no layer; near it are"),
        ("train.resume=gone/checkpoint-3", "is damaged"),
        ("model.path=configs/tiny/gone", "no such folder"),
        ("model.path=configs/tiny", "has no model_index.json"),
        ("data.train=gone.jsonl", "cannot be read"),
        ("train.trackers=[wandb]", "pip install 'duet\\[wandb\\]'"),
    ],
)
def test_a_run_that_cannot_start_says_why(small_run, override, message, tmp_path, monkeypatch):
    if "wandb" in override:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        train(small_run("decoder", override))
    assert not complete_checkpoints(tmp_path / "run")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run of the decoder with checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(small_config(run, "decoder"))
    return run


@pytest.fixture
def finished(two_steps, tmp_path):
    """The same, to be changed, where `small_run` writes."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def test_a_second_run_does_not_write_over_the_first(small_run, finished, tmp_path):
    written = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds checkpoint-2 already"):
        train(small_run("decoder"))
    with pytest.raises(UserError, match="of stage 'decoder', the config of 'ar'"):
        train(small_run("ar", "train.resume=latest"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == written


def test_going_back_to_an_older_checkpoint_needs_another_folder(small_run, finished, tmp_path):
    run, branch = finished, tmp_path / "branch"
    older = run / "checkpoint-1"
    with pytest.raises(UserError, match="is at step 1, but output_dir = .* holds checkpoint-2"):
        train(small_run("decoder", f"train.resume={older}"))
    common = [f"train.resume={older}", f"output_dir={branch}"]
    assert train(small_run("decoder", "train.max_steps=1", *common)) == older, "nothing to do"
    assert train(small_run("decoder", *common)) == branch / "checkpoint-2"
    assert all(
        torch.equal(v, adapter_weights(branch / "checkpoint-2")[k])
        for k, v in adapter_weights(run / "checkpoint-2").items()
    )


def test_a_checkpoint_is_there_whole_or_not_at_all(small_run, tmp_path, monkeypatch):
    def fills_the_disk(module, folder, info):
        raise OSError("no space left")

    with monkeypatch.context() as broken, pytest.raises(UserError, match="no space left"):
        broken.setattr("duet.train.tuning.save_adapter", fills_the_disk)
        train(small_run("decoder", "train.max_steps=1"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    again = train(small_run("decoder", "train.max_steps=1", "train.resume=latest"))
    assert again == tmp_path / "run" / "checkpoint-1"


def test_a_resumed_run_keeps_what_its_state_was_made_for(small_run, finished):
    saved, on = finished / "checkpoint-2", ["train.resume=latest", "train.max_steps=3"]
    for override, message in (
        ("optim.learning_rate=0.5", "optim.learning_rate = 0.5, but checkpoint .* with 0.001"),
        ("lora.rank=2", "lora.rank = 2, but"),
        ("seed=9", "seed = 9, but"),
        ("rollout.num_generations=8", "rollout.num_generations = 8, but"),
        ("rollout.priors=sampled", "rollout.priors = .sampled., but"),
        ("model.dtype=bfloat16", "model.dtype = 'bfloat16', but checkpoint"),
        ("train.mixed_precision=bf16", "train.mixed_precision = 'bf16', but checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            train(small_run("decoder", *on, override))
    position = json.loads((saved / "trainer_state.json").read_text())
    (saved / "trainer_state.json").write_text(json.dumps(position | {"num_processes": 2}))
    write_digests(saved)
    with pytest.raises(UserError, match="decoder has 8 samples over 1 processes and had 16"):
        train(small_run("decoder", *on))


def test_metrics_of_an_unsaved_run_are_not_erased(small_run, tmp_path):
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text('{"step": 1, "reward": 0.5}\n')
    with pytest.raises(UserError, match="holds the metrics of a run without a checkpoint"):
        train(small_run("decoder", "train.max_steps=1"))
    assert log.read_text() == '{"step": 1, "reward": 0.5}\n'


def test_the_gradient_is_clipped_and_told_unclipped(small_run, tmp_path):
    train(small_run("decoder", "optim.max_grad_norm=1e-4", "train.max_steps=1"))
    run = tmp_path / "run"
    state = torch.load(run / "checkpoint-1" / "state" / "optimizer.bin", weights_only=True)["state"]
    first = torch.cat([s["exp_avg"].flatten() for s in state.values()])
    assert float(first.norm()) == pytest.approx(0.1 * 1e-4, rel=1e-2)
    assert metrics(run)[0]["grad_norm"] > 2e-4


def test_betas_epsilon_and_weight_decay_reach_adam(small_run):
    AcceleratorState._reset_state(True)
    set = ["optim.adam_beta1=0.5", "optim.weight_decay=0.25", "optim.adam_epsilon=1e-15"]
    run = prepare(small_run("decoder", *set)).at(0)
    [group] = run.policy.optimizer.param_groups
    assert group["betas"][0] == 0.5 and group["weight_decay"] == 0.25
    assert group["eps"] == 1e-15
