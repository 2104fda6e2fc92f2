"""Samples side by side: chosen, split and joined, whatever stands in their fields."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from duet.inference.layout import Size
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.samples import Samples, join


@dataclass(frozen=True)
class Inner(Samples):
    per_sample = ("x",)

    x: torch.Tensor
    shared: str = "s"


@dataclass(frozen=True)
class Outer(Samples):
    per_sample = ("inner", "pixels", "names", "nothing")

    inner: Inner
    pixels: np.ndarray
    names: list[str]
    nothing: None = None


def made() -> Outer:
    return Outer(Inner(torch.arange(6).view(3, 2)), np.arange(3.0), ["a", "b", "c"])


def test_select_reaches_into_every_field():
    chosen = made().select([2, 0])
    assert len(chosen) == 2 and chosen.names == ["c", "a"] and chosen.nothing is None
    assert chosen.inner.x.tolist() == [[4, 5], [0, 1]] and chosen.inner.shared == "s"
    assert chosen.pixels.tolist() == [2, 0]


def test_consecutive_samples_share_memory():
    whole = made()
    assert whole.select(range(1, 3)).inner.x.data_ptr() == whole.inner.x[1].data_ptr()


def test_join_undoes_split():
    again = join(made().split())
    assert again.names == ["a", "b", "c"] and again.inner.x.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert again.pixels.tolist() == [0, 1, 2] and again.nothing is None


def test_a_rollouts_slice_keeps_its_own_seeds():
    images = [Image.new("RGB", (1, 1), (n, 0, 0)) for n in range(3)]
    request = Request("a card", (5, 6, 7), Size(32, 32))
    rollout = Rollout(request, images, torch.zeros(3, 1).long(), None, None)
    chosen = rollout.select([2, 1])
    assert chosen.request.seeds == (7, 6) and chosen.images == [images[2], images[1]]
