"""What a judge is asked and shown: a question of one's own, or a shipped one about an edit.

The shipped ones ask, in their own words, what VIEScore (Ku et al., arXiv 2312.14867) and after it
GEdit-Bench (Liu et al., arXiv 2504.17761) ask of an edit, with their marks of 0 to 10: is what was
asked for there, has the rest stayed, does the result look right. Both benchmarks join the three
into one figure; here each is a reward with a weight.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput

_FIELD = re.compile(r"prompt|row\[[^\[\]]+\]")  # what a question may name
_EDIT = ("sources", "image")


@dataclass(frozen=True)
class Question:
    text: str  # may name {prompt} and {row[KEY]}
    pictures: tuple[str, ...] = ("image",)  # of PICTURES, in the order of sending
    reading: str = "yes_no"
    scale: tuple[int, int] | None = None  # the worst and the best mark; None: the reading's


SHIPPED = {
    "instruction_following": Question(
        "The result was to be made from what stands before it by this instruction:\n{prompt}\n"
        "How far has the instruction been carried out? Judge only the change that it asks for, "
        "not what else has changed and not how good the result looks. "
        "0: nothing of it can be seen, as where the result is a copy; or it asks to change "
        "something that is not there. 10: all of it is there, exactly as asked.",
        _EDIT,
        "scale",
        (0, 10),
    ),
    "over_editing": Question(
        "The result was to be made from what stands before it by this instruction:\n{prompt}\n"
        "How well has everything stayed that the instruction does not speak of: other things and "
        "people, words, places, background, colours, framing? Do not judge whether the "
        "instruction has been carried out. 0: the result is another scene altogether. "
        "10: nothing has changed but what the instruction asks for or cannot do without.",
        _EDIT,
        "scale",
        (0, 10),
    ),
    "perceptual_quality": Question(
        "The picture was made by a machine. How natural does it look, and how free is it of "
        "faults: wrong distances, light or shadows, distortions, seams, smears, scratches, "
        "watermarks, deformed faces, hands or letters, parts that do not belong together? Do not "
        "judge what it shows. 0: it looks wrong all over. 10: it looks right, without a fault.",
        ("image",),
        "scale",
        (0, 10),
    ),
}

PICTURES = {
    "sources": ("the source", "the sources, in their order"),
    "image": ("the result, which is to be judged", ""),
    "wanted": ("the result that was wanted", ""),
}
ROW_KEYS = {"sources": "sources", "wanted": "image"}  # what the row has them under


def find_question(text: str) -> Question:
    """A shipped question by its name, or one's own. Raises UserError."""
    if text in SHIPPED:
        return SHIPPED[text]
    if re.fullmatch(r"\w+", text):  # a name, and no sentence
        raise UserError(
            f"judge question {text!r} is no shipped one: there are {', '.join(SHIPPED)}; "
            "a question of your own is a sentence"
        )
    advice = "it may name {prompt} and {row[KEY]}; write {{ and }} for braces"
    try:
        fields = [f for f in Formatter().parse(text) if f[1] is not None]
    except ValueError as error:
        raise UserError(f"judge question {text!r}: {error}: {advice}") from error
    for _, name, spec, conversion in fields:
        if spec or conversion or not _FIELD.fullmatch(name):
            raise UserError(f"judge question {text!r} names {name!r}: {advice}")
    return Question(text)


def check_pictures(pictures: Sequence[str]) -> tuple[str, ...]:
    """Raises UserError for names that are unknown or stand twice, and without `image`."""
    known = isinstance(pictures, list | tuple) and all(
        isinstance(p, str) and p in PICTURES for p in pictures
    )
    if not known or "image" not in pictures or len(set(pictures)) < len(pictures):
        raise UserError(
            f"judge pictures {pictures!r}: give a list of {', '.join(PICTURES)}, each once at "
            "most, with image in it"
        )
    return tuple(pictures)


def pictures_of(item: RewardInput, kind: str) -> list[Image.Image]:
    """Those of one of PICTURES; none where the row has none."""
    if kind == "image":
        return [item.image]
    if kind == "sources":
        longest = max(item.canvas)
        return [_at_most(source, longest) for source in item.sources]
    wanted = item.picture(ROW_KEYS[kind])
    return [] if wanted is None else [wanted]


def _at_most(picture: Image.Image, longest: int) -> Image.Image:
    """A judge reads no more of a source than of what is judged."""
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def order_told(counts: dict[str, int]) -> str:
    """Which picture is which, a line a kind; a picture that stands alone needs no telling."""
    if sum(counts.values()) == 1:
        return ""
    lines, place = [], 1
    for kind, count in counts.items():
        one, several = PICTURES[kind]
        if count == 1:
            lines.append(f"Picture {place} is {one}.\n")
        else:
            lines.append(f"Pictures {place} to {place + count - 1} are {several}.\n")
        place += count
    return "".join(lines)
