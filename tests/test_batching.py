"""The batcher: kinds apart, caps kept, nobody left alone."""

import pytest

from duet.inference.batching import in_batches, pack


@pytest.mark.parametrize(
    ("count", "cap", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (5, 4, [3, 2]), (2, 9, [2])]
)
def test_batches_are_evenly_filled(count, cap, sizes):
    batches = pack(range(count), cap)
    assert [len(b) for b in batches] == sizes
    assert [i for b in batches for i in b] == list(range(count))


def test_kinds_stand_apart_in_the_order_of_their_first():
    assert pack("abacab", 2, key=str) == [[0, 2], [4], [1, 5], [3]]


def test_weights_count_and_what_is_too_heavy_stands_alone():
    weights = [4, 4, 4, 4, 4]
    batches = pack(weights, 9, weight=int)
    assert [sum(weights[i] for i in b) for b in batches] == [8, 8, 4]
    assert pack([1, 7, 1], 3, weight=int) == [[0], [1], [2]]
    assert pack([10, 1, 1, 1, 1, 1, 1], 4, weight=int) == [[0], [1, 2], [3, 4, 5, 6]]


def test_results_come_back_in_the_items_order():
    seen = []

    def run(batch):
        seen.append(batch)
        return [2 * n for n in batch]

    assert in_batches([3, 10, 5, 12, 7], 2, lambda n: n > 9, run) == [6, 20, 10, 24, 14]
    assert seen == [[3, 5], [7], [10, 12]]
