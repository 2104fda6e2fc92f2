"""A step's samples over any number of processes: the same ones, and the same advantages."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from accelerate.state import AcceleratorState

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train import collect as module
from duet.train.advantages import group_advantages
from duet.train.geometry import changed, geometry, sizes_on_first
from duet.train.prompts import Group, draw_groups, shard
from duet.train.scoring import Scorer, require_whole_groups
from duet.train.setup import prepare
from tests.conftest import ROOT
from tests.sample_rewards import Constant, Rank

SIZE = 4  # samples of a group


def samples(groups: list[Group]) -> list[tuple]:
    """All that tells a sample, in the order that it is drawn."""
    return [
        (g.id, g.row["prompt"], g.fixed_seed, g.index, g.epoch, g.first + n, seed)
        for g in groups
        for n, seed in enumerate(g.seeds)
    ]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("prompts", [1, 2, 3, 6])
def test_each_sample_is_drawn_once_whoever_draws_it(prompts, processes):
    if prompts * SIZE % processes:
        return  # `geometry` refuses it
    groups = draw_groups([{"prompt": str(i)} for i in range(5)], 1, 3, prompts, SIZE)
    shares = [shard(groups, rank, processes) for rank in range(processes)]
    drawn = [sample for share in shares for sample in samples(share)]
    assert sorted(drawn) == sorted(samples(groups))
    assert {len(samples(share)) for share in shares} == {prompts * SIZE // processes}
    begun = [g.id for share in shares for g in share if g.first == 0]
    assert sorted(begun) == [g.id for g in groups], "one process draws each group's first sample"
    whole = [g for g in chain(*shares) if len(g.seeds) == SIZE]
    if prompts % processes == 0:
        assert len(whole) == prompts
    else:  # only at the ends of a process's share
        assert len(whole) >= prompts - (processes - 1)
        assert drawn == samples(groups), "in one order, so that sums round alike"


@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_one_process_row_by_row(scale, aggregation):
    config = load_config(ROOT / "configs" / "tiny" / "decoder.yaml")
    asked = {"grpo.scale_rewards": scale, "grpo.multi_objective_aggregation": aggregation}
    grpo, weights = changed(config, asked).grpo, torch.tensor([1.0, 0.3])
    groups = draw_groups([{"prompt": str(i)} for i in range(5)], 1, 0, 6, SIZE)
    scored = {s[-1]: torch.rand(2) for s in samples(groups)}  # by a sample's seed
    found = []
    for processes in (1, 2, 3, 4, 8):
        rows = [s for rank in range(processes) for s in samples(shard(groups, rank, processes))]
        scores = torch.stack([scored[row[-1]] for row in rows])
        ids = torch.tensor([row[0] for row in rows])
        values = group_advantages(scores, weights, ids, grpo).values.tolist()
        found.append(dict(zip((row[-1] for row in rows), values, strict=True)))
    assert all(f == pytest.approx(found[0], abs=1e-6) for f in found)
    assert found[-1] == found[0], "spread groups stay in order: to the bit"


@pytest.mark.parametrize(
    ("prompts", "processes", "spread", "first"),
    [(8, 4, False, [4, 4]), (3, 2, True, [4, 2]), (1, 2, True, [2]), (1, 4, True, [1]), (3, 12, True, [1])],
)  # fmt: skip
def test_the_geometry_says_where_groups_stand_on_several_processes(
    prompts, processes, spread, first
):
    made = geometry(small(prompts), processes, 5)
    assert (made.spread, made.samples) == (spread, sum(first))
    assert sizes_on_first(small(prompts), processes) == first
    groups = draw_groups([{"prompt": "a"}], 0, 0, prompts, SIZE)
    assert [len(g.seeds) for g in shard(groups, 0, processes)] == first


def small(prompts: int):
    return load_config(
        ROOT / "configs" / "tiny" / "decoder.yaml",
        [f"rollout.prompts_per_step={prompts}", f"rollout.num_generations={SIZE}",
         "optim.per_device_train_batch_size=1"],
    )  # fmt: skip


def test_samples_that_do_not_divide_are_refused():
    told = "3 groups of rollout.num_generations = 4 do not divide over 8 .* a multiple of 2 prompts"
    with pytest.raises(UserError, match=told):
        geometry(small(3), 8, 5)


def test_what_a_spread_group_shares_comes_from_one_process(small_run, monkeypatch):
    """Prior tokens made twice may round apart: here the other process's are told."""
    AcceleratorState._reset_state(True)
    sampled = ["rewards=[{name: duet.train.tiny.hackable.Sharpness}]", "rollout.priors=sampled"]
    run = prepare(small_run("decoder", "optim.per_device_train_batch_size=2", *sampled)).at(0)
    run = replace(run, geometry=replace(run.geometry, spread=True))
    told = []

    def gathered(made):
        told.extend(made)
        return [(id, replace(prior, tokens=prior.tokens.flip(1))) for id, prior in made]

    monkeypatch.setattr(module, "gather_object", gathered)
    for rollout, (_, prior) in zip(module.collect(run, 0).rollouts, told, strict=True):
        assert torch.equal(rollout.request.prior, prior.tokens[0].flip(0))
        assert not torch.equal(rollout.request.prior, prior.tokens[0])


@pytest.mark.parametrize("kind", ["trained", "watched"])
def test_a_reward_of_whole_groups_needs_them_whole(kind):
    rewards = {"one": Constant(), "ranks": Rank()}
    scorer = Scorer(**({"trained": {}, "watched": {}} | {kind: rewards}))
    with pytest.raises(UserError, match="reward 'ranks' scores whole groups.*give a multiple of 2"):
        require_whole_groups(scorer, small(3), 2)
    require_whole_groups(Scorer({"one": Constant()}, {}), small(3), 2)
