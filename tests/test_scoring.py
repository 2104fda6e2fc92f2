"""Scoring: beside sampling, in views, by group; what is not scored; what is only watched."""

import json
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import GrpoConfig, RewardConfig, WatchConfig
from duet.inference.engine import Engine
from duet.rewards.base import RewardInput, score
from duet.rewards.registry import load_reward
from duet.rewards.view import LOW_FACTOR, Viewed
from duet.train.advantages import NOT_APPLICABLE, group_advantages
from duet.train.checkpoint import complete_checkpoints
from duet.train.endings import require_scores
from duet.train.metrics import reward_metrics, score_mean
from duet.train.prompts import draw_groups
from duet.train.scoring import Scorer, Scores, sample_and_score
from duet.train.stages import STAGES
from duet.train.tiny.specimens import CARD, noisy
from duet.train.tiny.world import draw
from duet.train.watch import Look, Watch, image_metrics
from tests.conftest import CLIP, train
from tests.pictures import CLEAN
from tests.sample_rewards import Constant, Rank, Slow

NAN = math.nan


def test_overlapped_scores_are_those_of_the_sequential_order(pipeline, rows, small_run):
    config = small_run("decoder")
    engine = Engine(pipeline, config.sampling, config.sde, progress=False)
    groups = draw_groups(rows, 0, 0, 4, 3)
    requests = STAGES["decoder"](engine, config).requests(groups)
    sampling = []

    def sample(batch):
        sampling.append(time.perf_counter())
        return engine.rollout([requests[i] for i in batch], range(2))

    slow = Slow()
    sampled = sample_and_score(sample, groups, Scorer({"slow": slow}, {}), batch_size=3)
    one_by_one = [engine.rollout([r], range(2))[0] for r in requests]
    expected = [s for r in one_by_one for s in Slow()([RewardInput(i, "", {}) for i in r.images])]
    assert sampled.scores.trained["slow"].tolist() == torch.tensor(expected).tolist()
    assert [r.request.seeds for r in sampled.rollouts] == [g.seeds for g in groups]
    # while the first batch was scored, the next one was begun
    assert len(sampling) == 4 and sampling[1] < slow.spans[0][1]
    assert sampled.wait_seconds < sampled.reward_seconds


def test_what_is_trained_on_and_what_is_watched_are_apart_by_name(rows):
    """Rewards of one name may stand on both sides."""

    class Made:
        images = (CLEAN,) * 2

    scorer = Scorer({"a": Constant(1.0), "b": Constant(2.0)}, {"a": Constant(5.0)})
    scores = scorer(draw_groups(rows, 0, 0, 1, 2), [Made])
    assert scores.table.tolist() == [[1, 2], [1, 2]]
    assert scores.watched["a"].tolist() == [5, 5]


def test_a_reward_that_fails_beside_sampling_ends_the_step(rows):
    def fail(inputs):
        raise KeyError("weights")

    class Made:
        images = (CLEAN,)

    with pytest.raises(UserError, match="reward 'bad' raised KeyError"):
        sample_and_score(
            lambda batch: [Made] * len(batch),
            draw_groups(rows, 0, 0, 3, 1),
            Scorer({"bad": fail}, {}),
            1,
        )


def test_plain_cuda_is_the_processes_own_gpu_where_rewards_are_scored(rows, monkeypatch):
    """torch's current device is a thread's own, and 0 where none was set."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "number", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: setattr(current, "number", number))
    torch.cuda.set_device(3)

    def current_gpu(inputs):
        return [float(torch.cuda.current_device()) for _ in inputs]

    class Made:
        images = (CLEAN,)

    groups = draw_groups(rows, 0, 0, 2, 1)
    sampled = sample_and_score(
        lambda batch: [Made] * len(batch), groups, Scorer({"gpu": current_gpu}, {}), 1
    )
    assert sampled.scores.trained["gpu"].tolist() == [3, 3]


def test_batches_hold_whole_groups(rows):
    groups, seen = draw_groups(rows, 0, 0, 5, 4), []

    class Made:
        images = (CLEAN,) * 4

    def sample(batch):
        seen.append(list(batch))
        return [Made] * len(batch)

    sampled = sample_and_score(sample, groups, Scorer({"one": Constant()}, {}), batch_size=9)
    assert seen == [[0, 1], [2, 3], [4]] and len(sampled.scores.table) == 20
    seen.clear()
    sample_and_score(sample, groups, Scorer({"one": Constant()}, {}), batch_size=1)
    assert len(seen) == 5, "a group larger than the cap stands alone"


def test_a_group_reward_sees_one_prompts_samples_at_a_time():
    pictures = [Image.new("L", (8, 8), brightness) for brightness in (50, 40, 10, 30, 20)]
    inputs = [RewardInput(picture, "", {}) for picture in pictures]
    assert score(Rank(), "rank", inputs, [2, 3]) == [1, 0, 0, 2, 1]


@pytest.mark.parametrize("name", ["fidelity", "duet.train.tiny.hackable.Sharpness"])
def test_a_low_reward_hardly_sees_high_frequency_noise(name):
    args = {"model": CLIP, "pretrained": None} if name == "fidelity" else {}
    clean = draw(CARD, scale=2.0)
    moved = {}
    for view in ("full", "low"):
        reward = load_reward(RewardConfig(name, args=args, view=view))
        pictures = (clean, noisy(clean, 30))
        before, after = reward([RewardInput(i, CARD.prompt, {}) for i in pictures])
        moved[view] = abs(after - before)
    assert moved["low"] < 0.1 * moved["full"]


def test_the_high_view_shows_every_pixel_and_the_reference_follows(tmp_path):
    path = tmp_path / "reference.png"
    CLEAN.save(path)
    seen = []

    def look(inputs):
        for i in inputs:
            seen.append((i.image, i.picture("image")))
        return [1.0] * len(inputs)

    item = RewardInput(CLEAN, CARD.prompt, {"image": str(path)})
    assert Viewed(look, "high")([item]) == [1.0]
    assert [i.size for i, _ in seen] == [(48, 32)] * 4
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in seen)
    whole = np.zeros((64, 96, 3), np.uint8)
    for n, (part, _) in enumerate(seen):
        y, x = n // 2 * 32, n % 2 * 48
        whole[y : y + 32, x : x + 48] = np.asarray(part)
    assert np.array_equal(whole, np.asarray(CLEAN)), "the crops make up the picture"
    seen.clear()
    Viewed(look, "low")([item])
    assert [i.size for i, _ in seen] == [(96 // LOW_FACTOR, 64 // LOW_FACTOR)]


def test_a_sample_without_a_score_is_no_zero_in_the_metrics():
    scores = torch.tensor([[1.0, 2.0], [NAN, 2.0], [3.0, 4.0], [NAN, NAN]])
    metrics = reward_metrics(scores, torch.ones(2), ["a", "b"], torch.tensor([0, 0, 1, 1]))
    assert metrics["reward"] == 5.0  # of 3 and 7; the others' sums are unknown
    assert metrics["rewards/a/mean"] == 2.0 and metrics["rewards/a/not_scored"] == 0.5
    assert math.isnan(metrics["reward_std"]), "one known sum a group has no spread"


def test_what_does_not_apply_is_counted_apart_and_adds_nothing(rows):
    class Made:
        images = (CLEAN,) * 3

    answers = iter([[None, NAN, 1.0], [2.0, 2.0, 3.0], [None] * 3])
    scorer = Scorer(
        {"a": lambda i: next(answers), "b": lambda i: next(answers)}, {"c": lambda i: next(answers)}
    )
    scores = scorer(draw_groups(rows, 0, 0, 1, 3), [Made])
    metrics = reward_metrics(scores.table, torch.ones(2), ["a", "b"], torch.zeros(3))
    assert (
        metrics["rewards/a/not_applicable"]
        == metrics["rewards/a/not_scored"]
        == pytest.approx(1 / 3)
    )
    assert metrics["rewards/a/mean"] == 1.0 and metrics["reward"] == 3.0  # of 2 and 4
    assert metrics["rewards/b/not_applicable"] == 0
    assert math.isnan(score_mean(scores.watched["c"]))
    alone = reward_metrics(scores.table[:, :1], torch.ones(1), ["a"], torch.zeros(3))
    assert alone["reward"] == 1.0, "a prompt to which nothing applies is no 0"


@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
def test_advantages_where_a_reward_does_not_apply_are_those_of_the_others(aggregation):
    config = GrpoConfig(multi_objective_aggregation=aggregation)
    other = torch.tensor([1.0, 2.0, 4.0, 1.0, 5.0, 5.5])
    asked = torch.tensor([0.2, 0.9, 0.4, *[NOT_APPLICABLE] * 3])
    ids, both = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1.0, 1.0])
    mixed = group_advantages(torch.stack([asked, other], 1), both, ids, config).values
    alone = group_advantages(other[:, None], both[:1], ids, config).values
    assert torch.equal(mixed[3:], alone[3:]) and not torch.equal(mixed[:3], alone[:3])
    failed = torch.stack([asked.where(ids == 1, NAN), other], 1)
    left = group_advantages(failed, both, ids, config).values[:3]
    whole = aggregation == "sum_then_normalize"
    assert torch.equal(left, torch.zeros(3) if whole else alone[:3])
    nobody = group_advantages(asked[:, None], both[:1], ids, config)
    assert nobody.values[3:].tolist() == [0, 0, 0] and nobody.frac_reward_zero_std == 0.5


@pytest.mark.parametrize(
    ("column", "weight", "message"),
    [
        ([NOT_APPLICABLE] * 6, 1.0, None),
        ([NOT_APPLICABLE] * 4 + [NAN, 1.0], 1.0, None),  # half of those it applies to
        ([NOT_APPLICABLE] * 3 + [NAN, NAN, 1.0], 1.0, "left 67% of a step's samples"),
        ([1.0, 2.0], 1e308, "reward 'a': its scores times its weight inf are beyond 1e.18"),
        ([0.0, NAN], math.inf, "are beyond"),
        ([1e18, 0.0], 1e10, "are beyond"),
        ([NAN, NAN], 0.0, None),
    ],
)
def test_what_ends_a_run_is_failure_where_a_reward_applies(column, weight, message):
    train_config = SimpleNamespace(max_not_scored=0.5)
    run = SimpleNamespace(
        config=SimpleNamespace(train=train_config), weights=torch.tensor([weight])
    )
    collected = SimpleNamespace(all_scores=Scores({"a": torch.tensor(column)}, {}))
    if message is None:
        require_scores(run, collected)
    else:
        with pytest.raises(UserError, match=message):
            require_scores(run, collected)


def test_a_run_on_a_reward_that_applies_to_some_prompts_only(small_run, tmp_path):
    """More than half of the samples may be none of its business."""
    rewards = "rewards=[{name: tests.sample_rewards.Seldom}, {name: brisque}]"
    train(small_run("decoder", rewards, "train.max_steps=1", "train.max_not_scored=0.1"))
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["rewards/Seldom/not_applicable"] == 0.75
    assert metrics["rewards/Seldom/not_scored"] == 0 and metrics["rewards/Seldom/mean"] == 0.5


def test_too_many_samples_without_a_score_end_the_run(small_run, tmp_path):
    reward = "rewards=[{name: tests.sample_rewards.Unsure, args: {share: 0.6}}]"
    with pytest.raises(UserError, match="reward 'Unsure' left 62% .* train.resume=latest"):
        train(small_run("decoder", reward))
    assert not complete_checkpoints(tmp_path / "run"), "no step was finished"
    train(
        small_run(
            "decoder",
            reward,
            "train.resume=latest",
            "train.max_not_scored=0.7",
            "train.max_steps=1",
        )
    )
    assert complete_checkpoints(tmp_path / "run")[-1].name == "checkpoint-1"


def test_a_watched_reward_is_measured_and_not_trained_on(small_run, tmp_path):
    rewards = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"
    watched = "watch.rewards=[{name: tests.sample_rewards.Constant, args: {value: 5.0}}]"
    folders = [tmp_path / "alone", tmp_path / "watched"]
    for folder, overrides in zip(folders, ([], [watched]), strict=True):
        train(
            small_run("decoder", rewards, f"output_dir={folder}", "train.max_steps=1", *overrides)
        )
    alone, beside = (json.loads((f / "metrics.jsonl").read_text()) for f in folders)
    assert beside["watch/Constant/mean"] == 5.0
    assert beside["reward"] == alone["reward"] == alone["rewards/Sharpness/mean"]
    assert beside["grad_norm"] == alone["grad_norm"]


def test_the_alarm_can_end_a_run_with_a_checkpoint(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "duet.train.watch.Watch.__call__", lambda self, metrics: {"watch/alarm": 1.0}
    )
    monkeypatch.setattr("duet.train.watch.Watch.alarm_text", lambda self, metrics: "ocr lost 7%")
    watched = "watch.rewards=[{name: tests.sample_rewards.Constant, args: {value: 5.0}}]"
    with pytest.raises(
        UserError, match="watch.stop ended the run: .* ocr lost 7%; .*checkpoint-1 is whole"
    ):
        train(small_run("decoder", watched, "watch.stop=true", "train.save_steps=9"))
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def step(reward, held_out, sharpness=1.0):
    return {"reward": reward, "watch/ocr/mean": held_out, "images/sharpness": sharpness}


def test_the_alarm_rings_when_the_trained_reward_rises_and_a_watched_one_falls():
    config = WatchConfig(rewards=(RewardConfig("ocr"),), window=2, drop=0.05)

    def last(steps):
        watch = Watch(config)
        return [watch(s) for s in steps][-1]

    start = [step(1.0, 0.8), step(1.2, 0.8)]
    hacked = last([*start, step(1.5, 0.7), step(1.7, 0.7, sharpness=3.0)])
    assert hacked["watch/alarm"] == 1 and hacked["watch/ocr/lost"] == pytest.approx(0.125)
    assert hacked["drift/images/sharpness"] == pytest.approx(1.0)
    assert last([*start, step(1.5, 0.78), step(1.7, 0.78)])["watch/alarm"] == 0  # within the drop
    assert last([*start, step(0.9, 0.7), step(0.9, 0.7)])["watch/alarm"] == 0  # both fell
    assert last([*start, step(1.5, 0.7)])["watch/alarm"] == 0  # too early to say
    assert last([*start, step(1.5, NAN), step(1.7, 0.6)])["watch/alarm"] == 0  # nothing to compare
    resumed = Watch(config, [*start, step(1.5, 0.7)])
    assert resumed(step(1.7, 0.7))["watch/alarm"] == 1, "a resumed run remembers how it began"


def test_what_pictures_look_like_is_measured():
    flat = Image.new("RGB", (96, 64), "grey")
    flat, clean, spoiled = (Look.of(i) for i in (flat, CLEAN, noisy(CLEAN, 60)))
    still = image_metrics([flat, flat], [7, 7])
    assert still == {"images/sharpness": 0, "images/saturation": 0, "images/diversity": 0}
    varied = image_metrics([clean, flat], [7, 7])
    assert min(varied.values()) > 0
    noise = image_metrics([spoiled, flat], [7, 7])
    assert noise["images/sharpness"] > 3 * varied["images/sharpness"]
    apart = image_metrics([clean, flat, clean, flat], [1, 2, 1, 2])
    assert apart["images/diversity"] == 0, "a group's pictures, wherever they stand"


def test_each_picture_is_scored_beside_its_own_prompt(rows):
    groups = draw_groups(rows, 0, 0, 4, 2)
    places = {group.row["prompt"]: float(n) for n, group in enumerate(groups)}
    assert len(places) == 4
    made = SimpleNamespace(images=(CLEAN, CLEAN))
    sampled = sample_and_score(
        lambda batch: [made] * len(batch),
        groups,
        Scorer({"place": lambda inputs: [places[i.row["prompt"]] for i in inputs]}, {}),
        batch_size=4,
    )
    assert sampled.scores.trained["place"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
