"""The groups of prompts that a rollout draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duet.configs.row import Row


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one rollout."""

    id: int  # unique in the run
    row: Row
    seeds: tuple[int, ...]  # one a sample, for the policy's draws
    fixed_seed: int  # for what is held fixed within the group


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
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        seeds = tuple(derive_seed(seed, id, n) for n in range(num_generations))
        groups.append(Group(id, rows[order[place]], seeds, derive_seed(seed, id)))
    return groups


def shard(groups: Sequence[Group], rank: int, world_size: int) -> list[Group]:
    """This process's whole groups; the caller has checked that they divide evenly."""
    return list(groups[rank::world_size])
