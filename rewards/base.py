"""What a reward is: a batch of (image, prompt, row) in, one float a sample out.

class Brightness:
    def __call__(self, inputs):
        return [ImageStat.Stat(i.image.convert("L")).mean[0] / 255 for i in inputs]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from configs.errors import UserError


@dataclass(frozen=True)
class RewardInput:
    """One sample; `row` is the prompt's row of the dataset, its paths made absolute."""

    image: Image.Image
    prompt: str
    row: Mapping[str, Any]


class Reward(Protocol):
    """Scores a batch. NaN means: this sample could not be scored (never 0 for that)."""

    def __call__(self, inputs: Sequence[RewardInput]) -> Sequence[float]: ...


def score(reward: Reward, name: str, inputs: Sequence[RewardInput]) -> list[float]:
    """Call a reward and check its answer: float or NaN, one a sample.

    Raises UserError when the reward raises, answers for the wrong count, or with
    something that is no float or infinite.
    """
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
