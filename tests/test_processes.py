"""Two real processes over gloo: the update of one, unequal work, and ends that all share."""

import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import forked
from tests.conftest import ROOT, SHORT, adapter_weights, train

SMALL = [
    "rollout.prompts_per_step=2",
    "rollout.num_generations=4",
    "grpo.num_iterations=1",
    "optim.per_device_train_batch_size=4",
    "optim.gradient_accumulation_steps=1",
    "optim.lr_scheduler_type=constant",
    "sampling.num_inference_steps=6",
    "train.trackers=[]",
    "train.max_steps=1",
]

PICTURE = ROOT / "configs" / "tiny" / "prompts" / "train" / "000.png"
ALTERNATING = "duet.train.tiny.engine_updates.Alternating"


def two_processes(stage: str, *overrides: str) -> forked.Ended:
    return forked.run("duet.train", f"configs/tiny/{stage}.yaml", *SMALL, *overrides, processes=2)


def moments(run, step: int = 1) -> torch.Tensor:
    """Adam's first moments after so many rollouts, one vector."""
    file = run / f"checkpoint-{step}" / "state" / "optimizer.bin"
    state = torch.load(file, weights_only=True)["state"]
    return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])


def metrics(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text())


def assert_one_update(one, two) -> None:
    """After one step Adam's first moment is a tenth of the gradient."""
    state = json.loads((two / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["num_processes"] == 2
    gradient, gradient_of_two = moments(one), moments(two)
    assert float(gradient.abs().max()) > 0
    assert torch.allclose(
        gradient, gradient_of_two, atol=1e-4 * float(gradient.abs().max()), rtol=0
    )


def unequal_glyphs(folder) -> list[str]:
    """Settings of a run of which one process has one glyph length, the other three: it runs more
    forwards an update."""
    order = np.random.default_rng([0, 0]).permutation(4)  # how the first epoch walks the rows
    rows = [None] * 4
    for place, word in enumerate(["CAT", "PEN", "CAT", "HELLO"]):  # places 0, 2 are process 0's
        # encoded to the prior: no AR is sampled
        prompt = f'a red card with the white word "{word}"'
        rows[order[place]] = {"prompt": prompt, "image": str(PICTURE)}
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"data.train={data}", "rollout.prompts_per_step=4", "rollout.num_generations=2", "grpo.beta=0.01",
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["ar", "decoder"])
def test_two_processes_give_the_update_of_one(small_run, stage, tmp_path):
    """The same groups are drawn, so one Adam step ends in the same weights; nobody hangs.

    The reward does not look at pixels: one that rounds otherwise in another batch moves scores,
    and so the advantages.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    own = [f"rewards=[{{name: {ALTERNATING}}}]"]
    own += unequal_glyphs(tmp_path) if stage == "decoder" else [*SHORT]
    alone = ["train.max_steps=1", "optim.lr_scheduler_type=constant", f"output_dir={one}"]
    train(small_run(stage, *alone, *own))
    done = two_processes(stage, f"output_dir={two}", *own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"newest checkpoint: {two}/checkpoint-1\n") == 1, "told once"
    assert_one_update(one, two)
    # its step is the learning rate times the gradient's sign: where that is not rounding, the same
    learning_rate = 1e-3
    single, double = (
        torch.cat([v.flatten() for v in adapter_weights(r / "checkpoint-1").values()])
        for r in (one, two)
    )
    same = (single - double).abs() < 0.02 * learning_rate
    assert float(same.float().mean()) > 0.99
    moved = max(
        float(v.abs().max())
        for k, v in adapter_weights(one / "checkpoint-1").items()
        if "lora_B" in k
    )
    assert moved == pytest.approx(learning_rate, rel=0.05)
    for key in ("reward", "reward_std", "ratio/mean"):
        assert metrics(one)[key] == pytest.approx(metrics(two)[key], abs=1e-6)
    for key in ("ratio/min", "ratio/max"):  # extremes are one token's rounding
        assert metrics(one)[key] == pytest.approx(metrics(two)[key], abs=1e-4)


def test_a_run_goes_on_over_two_processes_with_one_group_on_both(small_run, tmp_path):
    """Of one process, which then goes on alone and, in a copy, over two; one held-out prompt."""
    row = {"prompt": 'a red card with the white word "CAT"'}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    common = [
        f"data.train={tmp_path / 'rows.jsonl'}", f"data.eval={tmp_path / 'rows.jsonl'}",
        "rewards=[{name: duet.train.tiny.hackable.Sharpness}]", "eval.rewards=[]",
        "eval.images_per_prompt=2", "train.eval_steps=1", "rollout.prompts_per_step=1",
        "optim.per_device_train_batch_size=2", "optim.lr_scheduler_type=constant",
        "train.trackers=[tensorboard]",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [*common, "optim.gradient_accumulation_steps=2", f"output_dir={one}"]
    train(small_run("decoder", *alone, "train.max_steps=1"))
    shutil.copytree(one, two)
    on = ["train.max_steps=2", "train.resume=latest"]
    train(small_run("decoder", *alone, *on))
    done = two_processes("decoder", *common, *on, f"output_dir={two}")
    assert done.returncode == 0, done.stderr
    [told] = [line for line in done.stderr.splitlines() if "goes on over" in line]
    assert "checkpoint-1 goes on over 2 processes, trained so far over 1" in told
    state = json.loads((two / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["num_processes"] == 2
    gradients = moments(one, 2), moments(two, 2)
    largest = float(gradients[0].abs().max())
    assert torch.allclose(*gradients, atol=1e-4 * largest, rtol=0) and largest > 0
    logged = [[json.loads(line) for line in (r / "metrics.jsonl").open()] for r in (one, two)]
    assert [[(s["step"], s["stage"]) for s in lines] for lines in logged] == [
        [(1, "decoder"), (1, "eval"), (2, "decoder"), (2, "eval")]
    ] * 2
    keys = ["reward", "reward_std", "images/diversity", "images/sharpness", "frac_reward_zero_std"]
    for line, names in ((2, keys), (3, ["eval/reward", "eval/rewards/Sharpness/mean"])):
        for key in names:
            assert logged[0][line][key] == pytest.approx(logged[1][line][key], rel=1e-4), key
    best = [json.loads((run / "best.json").read_text()) for run in (one, two)]
    assert best[0]["step"] == best[1]["step"]
    events = EventAccumulator(str(two / "duet"))
    events.Reload()
    for name in ("reward", "eval/reward"):
        assert [e.step for e in events.Scalars(name)] == [1, 2]


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path):
    reward = "rewards=[{name: tests.bad_rewards.RaisesOnOne}]"
    done = two_processes("decoder", reward, f"output_dir={tmp_path / 'run'}")
    assert done.statuses == (2, 2), "nobody ends the other"
    errors = [line for line in done.stderr.splitlines() if "duet: error:" in line]
    assert any("process 1 ended: reward 'RaisesOnOne' raised" in line for line in errors)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_comes_to_one_process_is_shared_by_all(tmp_path):
    """A loss that is not finite in the second step, a signal in the third: on the second alone."""
    run = tmp_path / "run"
    arguments = [
        "configs/tiny/decoder.yaml", *SMALL, "train.max_steps=5", "train.save_steps=2",
        "rewards=[{name: duet.train.tiny.hackable.Sharpness}]", f"output_dir={run}",
    ]  # fmt: skip
    done = forked.run("tests.one_bad_process", *arguments, processes=2)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [s["updates/skipped"] for s in logged] == [0, 1, 0], done.stderr
    state = torch.load(run / "checkpoint-2" / "state" / "optimizer.bin", weights_only=True)["state"]
    assert {int(s["step"]) for s in state.values()} == {1}, "one update of two was made"
    kept = sorted(p.parent.name for p in (run / "skipped" / "step-2").glob("*/samples.json"))
    assert kept == ["process-0", "process-1"]
    errors = [line for line in done.stderr.splitlines() if "duet: error:" in line]
    assert done.statuses == (143, 143) and errors, done.stderr
    assert all("SIGTERM ended the run" in line and "train.resume=latest" in line for line in errors)
    left = {p.name for p in run.glob("*checkpoint*")}
    assert left == {"checkpoint-2", "checkpoint-3"}, "the signal's step was finished"
