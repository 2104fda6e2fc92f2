"""What is set is what runs: schedules, dropout, how many checkpoints are kept, the step's spread."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import Dropout, Linear
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from duet.configs.errors import UserError
from duet.configs.schema import OptimConfig
from duet.train import gate, learn, update
from duet.train.collect import collect
from duet.train.retention import remove_old
from duet.train.schedule import make_schedule
from duet.train.setup import prepare
from duet.train.sharding import Sharding
from tests.conftest import train


def rates(updates: int = 8, **optim) -> list[float]:
    """Of each update and after the last, as shares of the learning rate."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule(optimizer, OptimConfig(**optim), updates)
    made = []
    for _ in range(updates + 1):
        made += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return made


def test_loaded_moments_lie_on_the_device_though_their_part_waits_elsewhere():
    """On the CPU; the device is one that there is none of here."""
    away = SimpleNamespace(device=torch.device("meta"), scaler=None, prepare=lambda *given: given)
    sharding = Sharding(away, Linear(2, 3), Linear)
    optimizer = AdamW(sharding.trained)
    sharding.prepare(optimizer, LambdaLR(optimizer, lambda _: 1.0), 1.0)
    sharding.module(torch.ones(1, 2)).sum().backward()
    sharding.step(made=True)
    sharding.load_state_dict(sharding.state_dict())
    placed = {name: v.device.type for own in optimizer.state.values() for name, v in own.items()}
    assert placed == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_the_learning_rate_warms_up_and_falls():
    assert rates() == [1.0] * 9
    assert rates(warmup_steps=4) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates(lr_scheduler_type="linear") == [1 - n / 8 for n in range(9)]
    falls = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates(lr_scheduler_type="linear", warmup_steps=2) == pytest.approx(falls)
    cosine = rates(lr_scheduler_type="cosine")
    assert [cosine[n] for n in (0, 2, 4, 8)] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, 0])


def test_a_warm_up_is_a_number_of_updates_or_a_share_of_all():
    for kind in ("constant", "linear", "cosine"):
        share = rates(lr_scheduler_type=kind, warmup_ratio=0.3)  # of 8: 2.4, so 3
        assert share == rates(lr_scheduler_type=kind, warmup_steps=3)


@pytest.fixture
def checkpoints(tmp_path):
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

    def left() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir())

    return left


def test_only_the_oldest_checkpoints_go(tmp_path, checkpoints):
    remove_old(tmp_path, None)
    assert len(checkpoints()) == 4
    remove_old(tmp_path, 3)
    assert checkpoints() == ["checkpoint-10", "checkpoint-4", "checkpoint-6"]
    remove_old(tmp_path, 1, [tmp_path / "." / "checkpoint-4"])
    assert checkpoints() == ["checkpoint-10", "checkpoint-4"], "newest, and resumed from"


def test_a_removal_that_was_cut_off_leaves_no_half_checkpoint(tmp_path, checkpoints, monkeypatch):
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        remove_old(tmp_path, 3)
    assert checkpoints() == [
        ".checkpoint-2.removed", "checkpoint-10", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip
    remove_old(tmp_path, 3)
    assert ".checkpoint-2.removed" not in checkpoints()


DROPOUT = ["lora.dropout=0.5", "optim.learning_rate=0.01", "optim.lr_scheduler_type=constant"]


@pytest.mark.parametrize("old", ["sampler", "trainer"])
def test_dropout_is_on_in_updates_alone(small_run, tmp_path, monkeypatch, old):
    """The gate and old log-probs see the policy that sampled; updates a thinned one."""
    seen: dict[str, set[bool]] = {"rescore": set(), "update": set()}
    place = []

    def watch(module, name):
        true = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, **k: (place.append(name), true(*a, **k), place.pop())[1]
        )

    watch(learn, "rescore")
    watch(learn, "update")
    forward = Dropout.forward

    def listen(self, x):
        if self.p == 0.5 and place:
            seen[place[-1]].add(self.training)
        return forward(self, x)

    monkeypatch.setattr(Dropout, "forward", listen)
    common = [*DROPOUT, f"grpo.old_logprobs={old}", "train.save_total_limit=1"]
    newest = train(small_run("decoder", *common))
    assert seen["rescore"] == {False} and seen["update"] == {True}
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps[0]["ratio/max"] == pytest.approx(1, abs=1e-5), "B = 0: nothing to drop yet"
    assert abs(steps[1]["ratio/max"] - 1) > 1e-5, "thinned against whole"
    if old == "trainer":
        assert steps[1]["sampling/sampling_logp_difference/max"] < 1e-4, "both whole"
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [newest.name]


def test_a_gate_that_saw_dropout_would_refuse(small_run, tmp_path):
    """So it is right that it sees none: a trained adapter's log-probs differ by what is dropped."""
    train(small_run("decoder", *DROPOUT, "train.max_steps=2"))
    AcceleratorState._reset_state(True)
    run = prepare(small_run("decoder", *DROPOUT, "train.max_steps=3", "train.resume=latest")).at(0)
    rollouts = collect(run, 2).rollouts
    whole = update.rescore(run, rollouts)
    gate.check_gap(run.stage, rollouts, whole, "float32")
    with run.policy.training():
        thinned = update.rescore(run, rollouts)
    with pytest.raises(UserError, match="the ratio is not 1"):
        gate.check_gap(run.stage, rollouts, thinned, "float32")
    assert torch.equal(update.rescore(run, rollouts), whole)


def test_a_run_over_the_batch_learns(small_run, tmp_path):
    train(small_run("ar", "grpo.scale_rewards=batch", "train.max_steps=1"))
    [step] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert step["grad_norm"] > 0
