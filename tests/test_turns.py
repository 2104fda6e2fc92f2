"""Turns: one run trains both parts, and neither knows of the other's settings."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.turns import part_at, rollouts_of, trained_rewards, turns
from duet.inference.adapters import adapter_disabled
from duet.train.collect import collect
from duet.train.setup import prepare
from duet.train.tiny import orders
from tests.conftest import ROOT, adapter_weights, train

BOTH = ROOT / "configs" / "tiny" / "both.yaml"
SHARP = "{name: duet.train.tiny.hackable.Sharpness}"
STAGES = (
    f"stages=[{{part: ar, steps: 1, rewards: [{SHARP}], lora: {{rank: 4}},"
    " optim: {gradient_accumulation_steps: 2}},"
    f" {{part: decoder, steps: 2, rewards: [{SHARP}], lora: {{rank: 2}},"
    " sde: {window_size: 1}, grpo: {num_iterations: 2}}]"
)
STEPS = 5  # ar, decoder, decoder, ar, decoder


def make(folder: Path, *overrides: str, stages: str = STAGES):
    small = [
        f"output_dir={folder}", "rollout.prompts_per_step=2", "rollout.num_generations=4",
        "optim.per_device_train_batch_size=4", "sampling.num_inference_steps=4", "train.trackers=[]",
        f"train.max_steps={STEPS}", "train.save_steps=1", stages,
    ]  # fmt: skip
    return load_config(BOTH, [*small, *overrides])


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(make(tmp_path_factory.mktemp("both"))).parent


def test_a_turn_has_what_it_leaves_out_from_the_run(tmp_path):
    config = make(tmp_path)
    own = turns(config)
    assert own["ar"].optim.gradient_accumulation_steps == 2
    assert own["ar"].optim.per_device_train_batch_size == 4, "key by key"
    assert own["decoder"].optim.gradient_accumulation_steps == 1
    assert own["decoder"].grpo.num_iterations == 2 and own["ar"].grpo.num_iterations == 1
    assert [turn.stage for turn in own.values()] == ["ar", "decoder"]
    single = load_config(ROOT / "configs" / "tiny" / "ar.yaml")
    assert turns(single) == {"ar": single}, "today's config is a run of one turn"


def test_turns_are_walked_again_and_again(tmp_path):
    config = make(tmp_path, "train.max_steps=8")
    walked = [part_at(config, step) for step in range(8)]
    assert "".join(p[0] for p in walked) == "addaddad"
    for steps in range(2, 20):
        config = make(tmp_path, f"train.max_steps={steps}")
        walked = [part_at(config, step) for step in range(steps)]
        assert {p: rollouts_of(config, p) for p in turns(config)} == {
            p: walked.count(p) for p in ("ar", "decoder")
        }


@pytest.mark.parametrize(
    ("stages", "overrides", "message"),
    [
        ("stages=[{part: ar, steps: 1}, {part: ar, steps: 1}]", [f"rewards=[{SHARP}]"], "every part once"),
        ("stages=[{part: ar, steps: 1}]", [], r"stages\[0\]: rewards = \[\] is out of range: .* at least one reward"),
        (
            "stages=[{part: ar, steps: 1, rewards: [{name: ocr, args: {threads: 1}}]},"
            " {part: decoder, steps: 1, rewards: [{name: ocr}]}]", [], "two rewards are called 'ocr' and differ",
        ),
    ],
)  # fmt: skip
def test_turns_that_do_not_go_together_are_refused(tmp_path, stages, overrides, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, *overrides, stages=stages)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=1", "train.max_steps = 1 .* enough for a rollout of decoder's turn"),
        ("sampling.temperature=0", "sampling.temperature = 0"),
        ("sampling.num_inference_steps=1", "window_start_max"),
    ],
)
def test_each_turn_is_checked_before_the_first_step(tmp_path, override, message):
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match=message):
        prepare(make(tmp_path, override))


def test_a_turn_moves_its_own_part_alone(run):
    moved = []
    for step in range(1, STEPS):
        one, other = (run / f"checkpoint-{s}" for s in (step, step + 1))
        changed = {
            p
            for p in ("ar", "decoder")
            if not equal(adapter_weights(one / p), adapter_weights(other / p))
        }
        moved.append(changed)
    assert moved == [{"decoder"}, {"decoder"}, {"ar"}, {"decoder"}]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [s["stage"] for s in steps] == ["ar", "decoder", "decoder", "ar", "decoder"]
    assert all(s["ratio/mean"] == pytest.approx(1, abs=0.05) for s in steps)


def test_a_part_keeps_its_own_optimizer_and_schedule(run):
    state = run / f"checkpoint-{STEPS}" / "state"
    made = []
    for name in ("optimizer.bin", "optimizer_1.bin"):
        moments = torch.load(state / name, weights_only=True)["state"]
        made += {int(m["step"]) for m in moments.values()}
    # the AR: two rollouts of one update; the decoder: three of two passes, two updates each
    assert made == [2, 12]
    assert (
        json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["stage"]
        == "ar+decoder"
    )


def test_the_decoders_turn_draws_its_priors_from_the_ar_as_it_stands(run, tmp_path):
    """And the AR's turn renders by the decoder as it stands."""
    AcceleratorState._reset_state(True)
    config = make(tmp_path, f"train.resume={run}/checkpoint-{STEPS}", f"output_dir={tmp_path}")
    training = prepare(config)

    def sampled(part: str):
        own = training.runs[part]
        return [(r.prior, r.images[0].tobytes()) for r in collect(own, step=1).rollouts]

    ar, decoder = (training.runs[p].policy for p in ("ar", "decoder"))
    before = {p: sampled(p) for p in ("ar", "decoder")}
    with adapter_disabled(ar.inner):
        others = sampled("decoder")
    assert any(
        not torch.equal(a, b) for (a, _), (b, _) in zip(before["decoder"], others, strict=True)
    )
    with adapter_disabled(decoder.inner):
        others = sampled("ar")
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(before["ar"], others, strict=True))
    assert any(a != b for (_, a), (_, b) in zip(before["ar"], others, strict=True))


@pytest.mark.parametrize("step", [2, 4])
def test_resume_is_exact_in_a_turn_and_across_its_border(run, tmp_path, step):
    overrides = [f"train.resume={run}/checkpoint-{step}", "train.save_steps=99"]
    reached = train(make(tmp_path, *overrides))
    for part in ("ar", "decoder"):
        assert equal(adapter_weights(run / reached.name / part), adapter_weights(reached / part))
    for name in ("optimizer.bin", "optimizer_1.bin", "scheduler.bin", "scheduler_1.bin"):
        assert (run / reached.name / "state" / name).read_bytes() == (
            reached / "state" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("decoder, steps: 2", "decoder, steps: 3"),
            r"stages\[1\].steps = 3, but checkpoint .* trained with 2",
        ),
        (("rank: 2", "rank: 3"), r"stages\[1\].lora.rank = 3"),
        (("window_size: 1", "window_size: 2"), r"stages\[1\].sde.window_size = 2"),
    ],
)
def test_resume_with_another_turn_is_refused(run, tmp_path, change, message):
    AcceleratorState._reset_state(True)
    config = make(tmp_path, f"train.resume={run}/checkpoint-2", stages=STAGES.replace(*change))
    with pytest.raises(UserError, match=message):
        prepare(config)


def test_a_run_of_one_part_does_not_go_on_from_both(run, tmp_path):
    AcceleratorState._reset_state(True)
    config = load_config(
        ROOT / "configs" / "tiny" / "ar.yaml",
        [f"output_dir={tmp_path}", f"train.resume={run}/checkpoint-2"],
    )
    with pytest.raises(UserError, match="is of stage 'ar\\+decoder', the config of 'ar'"):
        prepare(config)


def test_all_orders_have_the_same_rollouts(tmp_path):
    for order in orders.ORDERS:
        config = load_config(orders.write_config(order, tmp_path))
        assert {p: rollouts_of(config, p) for p in turns(config)} == {"ar": 45, "decoder": 40}


def test_an_evaluation_has_the_rewards_of_all_turns():
    names = [reward.metric_name for reward in trained_rewards(load_config(BOTH))]
    assert names == ["ocr", "fidelity", "alignment", "aesthetic"]
