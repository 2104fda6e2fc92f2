"""What a reward is: a batch of (image, prompt, row) in, one float a sample out.

class Brightness:
    def __call__(self, inputs):
        return [ImageStat.Stat(i.image.convert("L")).mean[0] / 255 for i in inputs]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import fit, read_picture


def _whole(image: Image.Image) -> Image.Image:
    return image


@dataclass(frozen=True)
class RewardInput:
    """One sample; `row` is the prompt's row of the dataset, its paths made absolute."""

    image: Image.Image
    prompt: str
    row: Mapping[str, Any]
    look: Callable[[Image.Image], Image.Image] = _whole  # how the view shows a picture
    size: tuple[int, int] | None = None  # width and height in pixels before the view

    def picture(self, key: str) -> Image.Image | None:
        """The row's picture of that key (`image`, `source`), brought to this image's size and view.

        Of another shape its centre is taken. None where the row has none.
        """
        stored = self.row.get(key)
        if stored is None:
            return None
        return self.look(fit(read_picture(stored), *(self.size or self.image.size)))


class Reward(Protocol):
    """Scores a batch. NaN means: this sample could not be scored (never 0 for that).

    Two things are optional. `load()` reads weights: the constructor stays cheap, and a
    run calls it before the first rollout. `whole_groups = True` asks to be called with
    exactly the samples of one prompt, to compare them with each other.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> Sequence[float]: ...


def score(
    reward: Reward, name: str, inputs: Sequence[RewardInput], group_sizes: Sequence[int]
) -> list[float]:
    """Call a reward and check its answer: float or NaN, one a sample.

    `group_sizes`: how many consecutive samples belong to each prompt.
    Raises UserError when the reward raises, answers for the wrong count, or with
    something that is no float or infinite.
    """
    assert sum(group_sizes) == len(inputs)
    if not getattr(reward, "whole_groups", False):
        return _score_batch(reward, name, inputs)
    ends = [sum(group_sizes[:i]) for i in range(len(group_sizes) + 1)]
    return [s for a, b in pairwise(ends) for s in _score_batch(reward, name, inputs[a:b])]


def _score_batch(reward: Reward, name: str, inputs: Sequence[RewardInput]) -> list[float]:
    try:
        answer = list(reward(inputs))
    except UserError:
        raise
    except Exception as error:  # a plug-in may raise anything; its name must be told
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if len(answer) != len(inputs):
        raise UserError(
            f"reward {name!r} answered {len(answer)} scores for {len(inputs)} samples: "
            "return one float a sample, NaN where there is no score"
        )
    try:
        scores = [float(value) for value in answer]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r} answered something that is no float: {error}") from error
    for index, value in enumerate(scores):
        if math.isinf(value):
            raise UserError(
                f"reward {name!r} answered {value} for sample {index}: "
                "return a finite float, or NaN where there is no score"
            )
    return scores
