"""The groups of prompts that a rollout draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from duet.configs.row import Row
from duet.rewards.wanted_text import unseen_texts


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one rollout, or those of them that one process draws."""

    id: int  # unique in the run
    row: Row
    seeds: tuple[int, ...]  # one a sample, for the policy's draws
    fixed_seed: int  # for what is held fixed within the group
    index: int  # of its row
    epoch: int  # how often the rows were walked before
    first: int = 0  # which of the whole group's samples the first of these is


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def draw_groups(
    rows: Sequence[Row], seed: int, step: int, count: int, num_generations: int
) -> list[Group]:
    """The step's groups: a function of (seed, step) alone, so any process can resume anywhere.

    Rows are walked epoch by epoch, each in its own seeded order.
    """
    groups = []
    for i in range(count):
        id = step * count + i
        epoch, place = divmod(id, len(rows))
        index = int(_order(len(rows), seed, epoch)[place])
        seeds = tuple(derive_seed(seed, id, n) for n in range(num_generations))
        groups.append(Group(id, rows[index], seeds, derive_seed(seed, id), index, epoch))
    return groups


def fixed_seeds(count: int, seed: int, epoch: int) -> list[int]:
    """The `fixed_seed` of the group that each of `count` rows has in an epoch, by the row."""
    places = _order(count, seed, epoch).argsort()
    return [derive_seed(seed, epoch * count + int(place)) for place in places]


def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def shard(groups: Sequence[Group], rank: int, world_size: int) -> list[Group]:
    """This process's samples; the caller has checked that they divide evenly.

    Whole groups where these divide too; else consecutive samples, so that few groups, and these
    on neighbours, stand on several processes.
    """
    if len(groups) % world_size == 0:
        return list(groups[rank::world_size])
    size = len(groups[0].seeds)
    share = len(groups) * size // world_size
    own = []
    for start, group in zip(range(0, len(groups) * size, size), groups, strict=True):
        low, high = max(rank * share - start, 0), min((rank + 1) * share - start, size)
        if low < high:
            own.append(replace(group, seeds=group.seeds[low:high], first=low))
    return own


def untold_text(rows: Sequence[Row]) -> str | None:
    """One line about prompts that ask for text which GLM-Image is not told to draw."""
    untold = [(row.prompt, text) for row in rows for text in unseen_texts(row.prompt)[:1]]
    if not untold:
        return None
    prompt, text = untold[0]
    return (
        f"{len(untold)} of {len(rows)} prompts ask for text in quotation marks that the model's "
        f"glyph encoder does not read, such as {text!r} in {prompt!r:.80}: it reads "
        "'...', \"...\", \u201c...\u201d and \u300c...\u300d"
    )
