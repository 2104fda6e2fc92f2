"""Reward models wait on the CPU while nothing is scored. There is no second device here: what is
sent where, and when."""

import json

import pytest
import torch

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.pickscore import PickScore
from duet.rewards.pyiqa import PyIqa
from duet.rewards.registry import load_reward, load_rewards
from duet.rewards.resting import Resting
from duet.train import evaluation, learn, scoring
from tests.conftest import CLIP, ROOT, train
from tests.pictures import CLEAN

TINY = {"model": CLIP, "pretrained": None}


class Stays:
    """A plug-in's reward that says nothing of devices."""

    def __call__(self, inputs):
        return [float(index) for index, _ in enumerate(inputs)]


class Moves(Stays):
    """One that has a device of its own; `device` follows the weights, as in transformers."""

    def __init__(self, device="home"):
        self.device, self.sent = device, []

    def to(self, device):
        self.device = device
        self.sent.append(device)

    def __call__(self, inputs):
        assert self.device == "home", "scores while it waits on the CPU"
        return super().__call__(inputs)


class Halfway(Stays):
    def to(self, device):
        raise AssertionError("without a device there is nowhere to return to")


def test_those_that_can_be_moved_rest_until_they_score():
    own, far = Moves(), Moves("cuda:1")
    resting = Resting(
        {"own": own, "far": far, "stays": Stays(), "half": Halfway()}.items(), "phase"
    )
    assert (own.device, far.device) == ("home", "cuda:1")
    resting.rest()
    assert (own.device, far.device) == ("cpu", "cpu")
    for _ in range(2):
        with resting.awake():
            assert (own.device, far.device) == ("home", "cuda:1")
        assert (own.device, far.device) == ("cpu", "cpu")
    with pytest.raises(KeyError), resting.awake():
        raise KeyError
    assert own.device == "cpu", "after a failure too"


def test_nothing_moves_where_nobody_asks():
    own = Moves()
    with Resting([("own", own)], "none").awake():
        pass
    assert own.sent == []


def test_one_that_cannot_be_moved_is_told_by_its_name():
    class Full(Moves):
        def to(self, device):
            if device == "home":
                raise MemoryError("no room")

    resting = Resting([("judge of taste", Full())], "phase")
    resting.rest()
    with pytest.raises(UserError) as told, resting.awake():
        pass
    assert str(told.value) == (
        "reward 'judge of taste' cannot be moved to 'home': MemoryError: no room"
    )


@pytest.mark.parametrize("view", ["full", "high"])
@pytest.mark.parametrize(
    "name",
    ["alignment", "aesthetic", "fidelity", "diversity", "source_consistency", "identity", "style"],
)
def test_all_weights_of_a_reward_move(name, view):
    """Told by another dtype, which `to` takes as it takes a device."""
    args = TINY | (
        {"head": "configs/tiny/judges/aesthetic.safetensors"} if name == "aesthetic" else {}
    )
    reward = load_rewards([RewardConfig(name, args=args, view=view, label="it")])["it"]
    inputs = [RewardInput(CLEAN, "a red card", {"source": CLEAN}) for _ in range(2)]
    before = reward(inputs)
    parts = [reward.clip.tower.model, *([reward.head] if name == "aesthetic" else [])]
    reward.to(torch.float64)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float64}
    reward.to(torch.float32)
    assert reward(inputs) == before and reward.device == torch.device("cpu")


@pytest.mark.parametrize(("reward", "weights"), [(PickScore(), "model"), (PyIqa("psnr"), "metric")])
def test_weights_of_other_libraries_move(reward, weights):
    module = torch.nn.Linear(1, 1)
    setattr(reward, weights, module)
    reward.to(torch.float64)
    assert module.weight.dtype == torch.float64 and isinstance(reward.device, torch.device)


def test_what_has_no_weights_to_move_has_no_device():
    for config in (RewardConfig("brisque"), RewardConfig("brisque", view="low")):
        assert not hasattr(load_reward(config), "to")


@pytest.fixture
def followed(monkeypatch):
    """In place of the config's rewards: two, one of them for whole groups."""
    rewards = {"fidelity": Moves(), "Sharpness": Moves()}
    rewards["fidelity"].whole_groups = True

    def load(configs):
        return {c.metric_name: rewards[c.metric_name] for c in configs if c.metric_name in rewards}

    for module in (scoring, evaluation):
        monkeypatch.setattr(module, "load_rewards", load)
    return rewards.values()


def test_in_a_run_they_rest_while_the_policy_is_updated(followed, small_run, monkeypatch, tmp_path):
    true, seen = learn.update, []

    def update(*args):
        seen.append([reward.device for reward in followed])
        return true(*args)

    monkeypatch.setattr(learn, "update", update)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a red card"}))
    evaluated = ["train.eval_steps=2", f"data.eval={tmp_path}/rows.jsonl", "eval.rewards=[]"]
    train(small_run("decoder", "model.offload=phase", "train.max_steps=2", *evaluated))
    assert seen == [["cpu", "cpu"]] * 2
    # once read they are sent away for training and for evaluations, and come back for each
    assert [reward.sent for reward in followed] == [["cpu", "cpu", *["home", "cpu"] * 3]] * 2


def test_in_an_evaluation_they_rest_while_pictures_are_made(followed, small_run, tmp_path):
    row = json.loads((ROOT / "configs/tiny/prompts/eval.jsonl").read_text().splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": row["prompt"]}))
    config = small_run(
        "decoder",
        "model.offload=phase",
        f"data.eval={tmp_path}/rows.jsonl",
        "eval.images_per_prompt=1",
        "eval.bootstrap_samples=10",
    )
    evaluation.evaluate(config, [], tmp_path / "report")
    assert [reward.sent for reward in followed] == [["cpu", "home", "cpu"]] * 2
