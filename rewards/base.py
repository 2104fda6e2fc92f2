"""What a reward is: a batch of (image, prompt, row) in, one float or None a sample out.

class Brightness:
    def __call__(self, inputs):
        return [ImageStat.Stat(i.image.convert("L")).mean[0] / 255 for i in inputs]
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import fit, read_picture, shown_size
from duet.configs.regions import WHITE, Box, black_and_white
from duet.configs.row_edits import KEEP, picture_of, sources_of, subjects_of
from duet.rewards.answers import Answer, BadAnswer, read_answers, require_apart

_MOST_SOURCE_PIXELS = 2**21  # more than any tower sees; a remote reward is sent them all


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
    scale: Callable[[Image.Image], Image.Image] = _whole  # the view's resolution, nothing cut off

    def picture(self, key: str) -> Image.Image | None:
        """The row's picture of that key, brought to this image's size and view: `image`, `source`
        (the first of the sources), `style`, `keep` (in mode L: white what must stay of the source).

        Of another shape its centre is taken. None where the row has none.
        """
        picture = picture_of(self.row, key)
        if picture is None:
            return None
        fitted = fit(picture, *(self.size or self.image.size))
        return _all_white(self.look(black_and_white(fitted))) if key == KEEP else self.look(fitted)

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the whole picture at the view's resolution."""
        return self.scale(Image.new("1", self.size or self.image.size)).size

    @property
    def sources(self) -> list[Image.Image]:
        """Whole, each in its own shape, at the view's resolution; large ones are made smaller."""
        return [self.scale(_bounded(read_picture(stored))) for stored in sources_of(self.row)]

    def subjects(self, sources: Sequence[Image.Image]) -> list[Box | None]:
        """A box in each of `self.sources`; None: nothing of that source is carried over."""
        own = [shown_size(stored) for stored in sources_of(self.row)]
        boxes = subjects_of(self.row, own)
        return [
            box and box.resized(size, source.size)
            for box, size, source in zip(boxes, own, sources, strict=True)
        ]


def _all_white(mask: Image.Image) -> Image.Image:
    """A pixel in which the view has mixed what must stay with what may change may change."""
    return mask.point(lambda value: WHITE if value == WHITE else 0)


def _bounded(picture: Image.Image) -> Image.Image:
    """Of at most `_MOST_SOURCE_PIXELS`, in the same proportions."""
    factor = (_MOST_SOURCE_PIXELS / (picture.width * picture.height)) ** 0.5
    if factor >= 1:
        return picture
    sides = (max(1, int(side * factor)) for side in picture.size)
    return picture.resize(tuple(sides), Image.Resampling.LANCZOS)


class Reward(Protocol):
    """Scores a batch, as TRL's do. None: the reward does not apply to this sample (no text asked
    for, no reference). NaN: the sample could not be scored (never 0 for that).

    What it is given is its own: it may change pictures and rows.
    Four things are optional. `load()` reads weights: the constructor stays cheap, and a
    run calls it before the first rollout. `whole_groups = True` asks to be called with
    exactly the samples of one prompt, to compare them with each other. `device` and
    `to(device)`: with `model.offload` phase a run sends the weights to "cpu" while nothing is
    scored, and back to the device. `silence()`, of one that asks servers: asked after a step, it
    tells why none of them has answered since it was asked last, or None; a run ends by it.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> Sequence[Answer]: ...


def score(
    reward: Reward, name: str, inputs: Sequence[RewardInput], group_sizes: Sequence[int]
) -> list[Answer]:
    """Call a reward and check its answer: float, NaN or None, one a sample.

    `group_sizes`: how many consecutive samples belong to each prompt.
    Raises UserError when the reward raises, answers for the wrong count, with
    something that is no float or infinite, or with what float32 does not hold apart.
    """
    assert sum(group_sizes) == len(inputs)
    ends = [sum(group_sizes[:i]) for i in range(len(group_sizes) + 1)]
    try:
        if getattr(reward, "whole_groups", False):
            parts = [_score_batch(reward, name, inputs[a:b]) for a, b in pairwise(ends)]
            answers = [answer for part in parts for answer in part]
        else:
            answers = _score_batch(reward, name, inputs)
        for a, b in pairwise(ends):
            require_apart(answers[a:b])
    except BadAnswer as error:
        raise UserError(f"reward {name!r} {error}") from error
    return answers


def _score_batch(reward: Reward, name: str, inputs: Sequence[RewardInput]) -> list[Answer]:
    try:
        answers = reward(own_copies(inputs))
    except (UserError, BadAnswer):
        raise
    except (Exception, SystemExit) as error:  # a plug-in may raise anything; its name must be told
        raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    return read_answers(answers, len(inputs))


def own_copies(inputs: Sequence[RewardInput]) -> list[RewardInput]:
    """The same to look at; what one reward does to it, no other sees. Samples share their row."""
    rows = deepcopy([item.row for item in inputs])
    return [
        replace(item, image=item.image.copy(), row=row)
        for item, row in zip(inputs, rows, strict=True)
    ]
