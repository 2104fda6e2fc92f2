"""Turns: which part of the model a run trains in which rollout, and by which settings."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

from duet.configs.errors import UserError
from duet.configs.reward_schema import RewardConfig
from duet.configs.schema import RunConfig, TurnConfig
from duet.configs.setting import require

_OWN = tuple(f.name for f in fields(TurnConfig) if f.name not in ("part", "steps"))


@dataclass(frozen=True)
class Beside:
    """A turn, and the run's others, which wait on the same device."""

    own: RunConfig
    others: Sequence[RunConfig]


def inherit(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tree whose `stages` have what they leave out from the run's own sections, key
    by key; a list is taken whole.
    """
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return dict(tree)
    run = {name: tree[name] for name in _OWN if name in tree}
    return dict(tree) | {"stages": [_merged(run, turn) for turn in stages]}


def _merged(run: Mapping[str, Any], turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn  # told when it is built
    both = dict(run)
    for name, own in turn.items():
        whole = run.get(name)
        both[name] = whole | own if isinstance(whole, dict) and isinstance(own, dict) else own
    return both


def turns(config: RunConfig) -> dict[str, RunConfig]:
    """The config as each part's rollouts have it, by the part's name.

    Raises UserError for a turn whose settings do not go together.
    """
    if not config.stages:
        return {config.stage: config}
    made = {}
    for i, turn in enumerate(config.stages):
        own = {name: getattr(turn, name) for name in _OWN}
        try:
            made[turn.part] = replace(config, stage=turn.part, stages=(), **own)
        except UserError as error:
            raise UserError(f"stages[{i}]: {error}") from error
    return made


def each_beside_others(parts: Collection[RunConfig]) -> Iterator[Beside]:
    """Of `turns`."""
    for part in parts:
        yield Beside(part, [other for other in parts if other is not part])


def part_at(config: RunConfig, step: int) -> str:
    """Whose rollout the step is, counted from 0: the stages in their order, again and again."""
    if not config.stages:
        return config.stage
    ends = list(accumulate(turn.steps for turn in config.stages))
    place = step % ends[-1]
    return next(t.part for t, end in zip(config.stages, ends, strict=True) if place < end)


def rollouts_of(config: RunConfig, part: str) -> int:
    """How many of the run's rollouts are the part's. Raises UserError for none."""
    last = config.train.max_steps
    if not config.stages:
        return last
    cycles, rest = divmod(last, sum(turn.steps for turn in config.stages))
    count = 0
    for turn in config.stages:
        if turn.part == part:
            count = cycles * turn.steps + min(rest, turn.steps)
            require(count > 0, "train.max_steps", last, f"enough for a rollout of {part}'s turn")
        rest = max(0, rest - turn.steps)
    return count


def trained_rewards(config: RunConfig) -> tuple[RewardConfig, ...]:
    """Of all turns, each name once. Raises UserError where two of one name differ."""
    found = {}
    for turn in turns(config).values():
        for reward in turn.rewards:
            known = found.setdefault(reward.metric_name, reward)
            if replace(known, weight=1.0) != replace(reward, weight=1.0):
                raise UserError(
                    f"stages: two rewards are called {reward.metric_name!r} and differ: "
                    "give one a label"
                )
    return tuple(found.values())
