"""The only batcher: equal kinds together, evenly filled."""

from collections.abc import Callable, Hashable, Sequence
from math import ceil
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def pack(
    items: Sequence[Item],
    cap: int,
    key: Callable[[Item], Hashable] = lambda item: None,
    weight: Callable[[Item], int] = lambda item: 1,
) -> list[list[int]]:
    """Indices of the items in batches of one `key` and at most `cap` weight.

    Within a kind the order stays and the batches weigh about the same, so that none is
    left with a few items; an item heavier than `cap` stands alone.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault(key(item), []).append(i)
    batches = []
    for same in kinds.values():
        weights = [weight(items[i]) for i in same]
        total = sum(weights)
        share = total / ceil(total / cap)
        batch, held, done, closed = [], 0, 0, 0
        for i, own in zip(same, weights, strict=True):
            if batch and (held + own > cap or done >= share * (closed + 1)):
                batches.append(batch)
                batch, held = [], 0
                closed = max(closed + 1, int(done / share))
            batch.append(i)
            held, done = held + own, done + own
        batches.append(batch)
    return batches


def in_batches(
    items: Sequence[Item],
    cap: int,
    key: Callable[[Item], Hashable],
    run: Callable[[list[Item]], Sequence[Result]],
) -> list[Result]:
    """Run the items, batches of one kind at a time; results in the items' order."""
    results: dict[int, Result] = {}
    for batch in pack(items, cap, key):
        results |= zip(batch, run([items[i] for i in batch]), strict=True)
    return [results[i] for i in range(len(items))]
