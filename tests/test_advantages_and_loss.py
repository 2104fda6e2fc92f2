"""GRPO's numbers, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import pad

from duet.configs.schema import GrpoConfig
from duet.train.advantages import group_advantages
from duet.train.loss import (
    DR_GRPO_LENGTH,
    Actions,
    Counts,
    importance_ratio,
    k3_kl,
    policy_loss,
    truncated_weight,
)
from duet.train.metrics import Totals, reward_metrics

NAN = float("nan")
ONE = torch.ones(1)
SUM_FIRST = GrpoConfig(multi_objective_aggregation="sum_then_normalize")


def test_scores_are_normalised_within_their_group():
    scores = torch.tensor([[1.0], [10.0], [3.0], [30.0]])
    result = group_advantages(scores, ONE, torch.tensor([7, 9, 7, 9]))
    # each group: two samples, centred +-d, unbiased std sqrt(2) d
    assert result.values.tolist() == pytest.approx([-0.7071, -0.7071, 0.7071, 0.7071], abs=1e-3)


def test_each_reward_is_normalised_before_it_is_weighted():
    scores = torch.tensor([[0.0, 100.0], [1.0, 0.0]])
    weights, ids = torch.tensor([1.0, 0.5]), torch.zeros(2, dtype=torch.long)
    per_reward = group_advantages(scores, weights, ids).values
    assert per_reward.tolist() == pytest.approx([-0.3535, 0.3535], abs=1e-3)
    summed = group_advantages(scores, weights, ids, config=SUM_FIRST).values
    assert summed.tolist() == pytest.approx([0.7071, -0.7071], abs=1e-3)


def test_without_scaling_only_the_mean_is_taken_off():
    result = group_advantages(
        torch.tensor([[1.0], [4.0]]),
        ONE,
        torch.zeros(2).long(),
        config=GrpoConfig(scale_rewards="none"),
    )
    assert result.values.tolist() == pytest.approx([-1.5, 1.5])


def trl_advantages(rewards_per_func, weights, generations, aggregation, scale):
    """GRPOTrainer's formulas in TRL, by hand: groups one after another, nothing left out."""
    groups = rewards_per_func.unflatten(0, (-1, generations))  # [groups, G, R]
    if aggregation == "sum_then_normalize":
        sums = (groups * weights).sum(-1)
        std = sums.std() if scale == "batch" else sums.std(1, keepdim=True)
        centred = sums - sums.mean(1, keepdim=True)
        return (centred if scale == "none" else centred / (std + 1e-4)).flatten()
    normalised = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    sums = (normalised * weights).sum(-1).flatten()
    return (sums - sums.mean()) / (sums.std() + 1e-4)


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "batch"),
    ],
)
def test_advantages_are_trls(aggregation, scale):
    scores, weights = torch.rand(12, 2) * torch.tensor([1.0, 30.0]), torch.tensor([1.0, 0.5])
    order = torch.randperm(12)
    ids = torch.arange(3).repeat_interleave(4)
    config = GrpoConfig(scale_rewards=scale, multi_objective_aggregation=aggregation)
    made = group_advantages(scores[order], weights, ids[order], config).values
    expected = trl_advantages(scores, weights, 4, aggregation, scale)
    assert torch.allclose(made, expected[order], atol=1e-5)


def test_a_batch_in_which_nothing_differs_gives_zero_and_nan_is_left_out():
    ids = torch.tensor([0, 0, 1, 1])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        config = GrpoConfig(scale_rewards="batch", multi_objective_aggregation=aggregation)
        flat = group_advantages(torch.ones(4, 1), ONE, ids, config).values
        assert flat.tolist() == [0, 0, 0, 0]
        some = torch.tensor([[1.0], [3.0], [NAN], [2.0]])
        values = group_advantages(some, ONE, ids, config).values
        assert values[0] == -values[1] < 0 and values[2:].tolist() == [0, 0]


def test_nan_leaves_the_sample_out_and_is_no_zero():
    scores = torch.tensor([[2.0], [NAN], [4.0]])
    ids = torch.zeros(3, dtype=torch.long)
    values = group_advantages(scores, ONE, ids).values
    assert values.tolist() == pytest.approx([-0.7071, 0.0, 0.7071], abs=1e-3)
    both = torch.cat([scores, torch.tensor([[1.0], [2.0], [3.0]])], 1)
    values = group_advantages(both, torch.ones(2), ids).values
    assert values.tolist() == pytest.approx([-1.7071, 0.0, 1.7071], abs=1e-3)
    summed = group_advantages(both, torch.ones(2), ids, config=SUM_FIRST).values
    assert summed.tolist() == pytest.approx([-0.7071, 0.0, 0.7071], abs=1e-3)


def test_a_reward_of_no_weight_takes_no_sample_away():
    scores, ids = torch.tensor([[2.0, NAN], [4.0, 1.0]]), torch.zeros(2, dtype=torch.long)
    weights = torch.tensor([1.0, 0.0])
    alone = group_advantages(scores[:, :1], ONE, ids, config=SUM_FIRST).values
    assert (
        group_advantages(scores, weights, ids, config=SUM_FIRST).values.tolist() == alone.tolist()
    )
    assert reward_metrics(scores, weights, ["a", "b"], ids)["reward"] == 3


def test_a_group_without_spread_gives_zero_and_is_counted():
    scores = torch.tensor([[0.3], [0.3], [0.1], [0.2], [NAN], [NAN]])
    result = group_advantages(scores, ONE, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert result.values[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]
    assert result.frac_reward_zero_std == pytest.approx(2 / 3)


def test_clipping_has_two_sides():
    old = torch.zeros(4, 1)
    new = torch.tensor([[0.5], [1.6], [0.5], [1.6]]).log()
    gain = torch.tensor([1.0, 1.0, -1.0, -1.0])
    result = policy_loss(
        Actions(new, old, gain), GrpoConfig(epsilon=0.2, epsilon_high=0.4), Counts(1, 4)
    )
    # -min(r A, clip A): -0.5, -1.4, +0.8, +1.6
    assert float(result.loss) == pytest.approx((-0.5 - 1.4 + 0.8 + 1.6) / 4)
    shares = {name: float(result.metrics[f"clip_ratio/{name}_mean"]) for name in ("low", "high")}
    assert shares == {"low": 0.25, "high": 0.25}, "each side holds only where it limits a gain"
    assert float(result.metrics["clip_ratio/region_mean"]) == 0.5
    assert float(result.metrics["ratio/min"]) == pytest.approx(0.5)
    assert float(result.metrics["ratio/max"]) == pytest.approx(1.6)


def test_gradient_at_ratio_one_is_that_of_the_policy_gradient():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    actions = Actions(logprobs, torch.zeros(2, 3), torch.tensor([2.0, -1.0]))
    policy_loss(actions, GrpoConfig(), Counts(3, 6)).loss.backward()
    assert logprobs.grad.tolist() == [pytest.approx([-2 / 6] * 3), pytest.approx([1 / 6] * 3)]


def test_dr_grpo_divides_by_a_constant():
    new, gain = torch.zeros(2, 50), torch.tensor([1.0, 3.0])
    loss = policy_loss(
        Actions(new, new, gain), GrpoConfig(loss_type="dr_grpo"), Counts(50, 100)
    ).loss
    assert float(loss) == pytest.approx(-(50 * 1 + 50 * 3) / 2 / DR_GRPO_LENGTH)


def test_gspo_takes_the_geometric_mean_of_a_sequence():
    new = torch.tensor([[math.log(2.0), math.log(0.5), math.log(8.0)]])
    assert importance_ratio(new, torch.zeros(1, 3), "sequence")[0].tolist() == pytest.approx(
        [2.0] * 3
    )
    assert importance_ratio(new, torch.zeros(1, 3), "token")[0].tolist() == pytest.approx(
        [2, 0.5, 8]
    )
    config = GrpoConfig(importance_sampling_level="sequence", epsilon=0.2)
    actions = Actions(new, torch.zeros(1, 3), torch.ones(1))
    assert float(policy_loss(actions, config, Counts(3, 3)).loss) == pytest.approx(-1.2)


def test_dapo_weighs_every_action_of_the_step_the_same():
    """TRL's dapo: the sum over a step's actions over their number, micro-batch by micro-batch."""
    config = GrpoConfig(loss_type="dapo")
    short, long = torch.zeros(2, 3), torch.zeros(1, 9)
    mean = (6 + 9) / 2
    losses = [
        policy_loss(Actions(short, short, torch.tensor([1.0, 2.0])), config, Counts(3, mean)).loss,
        policy_loss(Actions(long, long, torch.tensor([5.0])), config, Counts(9, mean)).loss,
    ]
    # the two micro-batches are averaged, as gradient accumulation does
    assert float(sum(losses) / 2) == pytest.approx(-(3 * 1 + 3 * 2 + 9 * 5) / 15)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sample_with_fewer_actions_counts_by_those_it_has(loss_type, level):
    """Beside a longer one it adds what it would by itself, to the loss and to every metric."""
    config = GrpoConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    cap = config.importance_sampling_cap

    def actions(count: int, gain: float) -> Actions:
        new, kl = 0.3 * torch.randn(1, count), torch.rand(1, count)
        weight = (1 + cap / 2 * torch.rand(1, count)).clamp(max=cap)
        return Actions(new, torch.zeros(1, count), torch.tensor([gain]), kl, weight)

    long, short = actions(5, 1.0), actions(2, -2.0)
    padded = {  # the weight of an action with log-probs 0 and 0 is 1
        name: torch.cat([getattr(long, name), pad(getattr(short, name), (3, 0), value=value)])
        for name, value in (("logprobs", 0), ("old", 0), ("kl", 0), ("weight", 1))
    }
    taken = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
    both = Actions(**padded, advantages=torch.tensor([1.0, -2.0]), taken=taken)
    made = policy_loss(both, config, Counts(torch.tensor([5, 2]), 7))
    own = [policy_loss(a, config, Counts(a.logprobs.shape[1], 7)) for a in (long, short)]
    together = sum if loss_type == "dapo" else lambda losses: sum(losses) / 2
    assert float(made.loss) == pytest.approx(float(together([o.loss for o in own])))
    for name, value in made.metrics.items():
        one, other = (float(o.metrics[name]) for o in own)
        extreme = {"ratio/min": min, "ratio/max": max}.get(name)
        expected = extreme(one, other) if extreme else (5 * one + 2 * other) / 7
        assert float(value) == pytest.approx(expected), name


def test_an_importance_weight_is_truncated_and_scales_the_gain_alone():
    old, sampled = torch.tensor([[0.5, 0.4, 0.9]]).log(), torch.tensor([[0.25, 0.5, 0.1]]).log()
    weight = truncated_weight(old, sampled, cap=3.0)
    assert weight[0].tolist() == pytest.approx([2.0, 0.8, 3.0])
    kl = torch.full((1, 3), 0.5)
    actions = Actions(old, old, torch.ones(1), kl, weight)
    loss = policy_loss(actions, GrpoConfig(beta=0.1), Counts(3, 3)).loss
    assert float(loss) == pytest.approx(-(2.0 + 0.8 + 3.0) / 3 + 0.1 * 0.5)


def test_k3_is_an_unbiased_kl():
    p, q = Categorical(torch.tensor([0.5, 0.3, 0.2])), Categorical(torch.tensor([0.2, 0.3, 0.5]))
    ids = torch.arange(3)
    expected = (p.probs * k3_kl(p.log_prob(ids), q.log_prob(ids))).sum()
    assert float(expected) == pytest.approx(float(kl_divergence(p, q)), abs=1e-6)


def test_beta_weighs_the_kl():
    kl = torch.full((1, 2), 0.25)
    zero = torch.zeros(1, 2)
    loss = policy_loss(
        Actions(zero, zero, torch.zeros(1), kl), GrpoConfig(beta=0.4), Counts(2, 2)
    ).loss
    assert float(loss) == pytest.approx(0.1)


def test_means_of_unequal_micro_batches_are_weighted_and_extremes_are_not():
    totals = Totals()
    for value, weight in ((1.0, 1.5), (3.0, 0.5)):  # of 6 actions and of 2
        totals.add(dict.fromkeys(("ratio/max", "kl"), torch.tensor(value)), weight)
    alone = SimpleNamespace(device="cpu", gather=lambda table: table)
    assert totals.reduce(alone) == {"ratio/max": 3.0, "kl": (6 * 1.0 + 2 * 3.0) / 8}


def test_extremes_of_all_processes_are_kept():
    other = torch.tensor([[0.5, 3.0, 4.0]])
    accelerator = SimpleNamespace(device="cpu", gather=lambda table: torch.cat([table, other]))
    totals = Totals()
    for value in (1.0, 2.0):
        totals.add(dict.fromkeys(("ratio/min", "ratio/max", "loss"), torch.tensor(value)))
    assert totals.reduce(accelerator) == {"ratio/min": 0.5, "ratio/max": 3.0, "loss": 2.75}
