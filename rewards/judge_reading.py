"""How a judge's answer becomes a score: by its log-probabilities, else by its text."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from duet.configs.errors import UserError

Probabilities = dict[str, float]  # of the most likely tokens at one position, bare and lower case


class Unscored(ValueError):
    """A sample without a readable answer; the message tells why."""


class Reading(Protocol):
    instruction: str  # how to answer
    max_tokens: int  # of an answer
    logprobs: bool  # whether they are read

    def read(self, choice: Any) -> float:
        """One of a chat completion's choices as a score in [0, 1]. Raises Unscored."""


class YesNo:
    """P(yes) / (P(yes) + P(no)) of the first token; by the text, 1 or 0."""

    instruction = "Answer with one word: yes or no."
    max_tokens, logprobs = 8, True

    @staticmethod
    def read(choice: Any) -> float:
        text, positions = _parts(choice)
        first = positions[0] if positions else {}
        yes, no = first.get("yes", 0.0), first.get("no", 0.0)
        if yes + no > 0:
            return yes / (yes + no)
        said = set(re.findall(r"\b(yes|no)\b", text.lower()))
        if len(said) != 1:
            raise Unscored(f"neither yes nor no: {text[:80]!r}")
        return float(said == {"yes"})


class Scale:
    """The expected mark, or the mark in the text, from worst to best as 0 to 1."""

    max_tokens, logprobs = 8, True

    def __init__(self, worst: int, best: int) -> None:
        """Raises UserError for marks above 10, whose tokens no reading tells apart."""
        if best > 10:
            raise UserError(f"judge scale {[worst, best]}: marks above 10 need reading 'reasoned'")
        self.worst, self.best = worst, best
        self.instruction = f"Answer with one whole number from {worst} (worst) to {best} (best)."

    def read(self, choice: Any) -> float:
        text, positions = _parts(choice)
        marks = self._marks(text, positions)
        total = sum(marks.values())
        if total > 0:
            return self._share(sum(m * p for m, p in marks.items()) / total)
        said = re.findall(r"\d+(?:\.\d+)?", re.sub(rf"(/|out of)\s*{self.best}\b", "", text))
        if len(said) != 1 or not self.worst <= float(said[0]) <= self.best:
            raise Unscored(f"no single mark from {self.worst} to {self.best}: {text[:80]!r}")
        return self._share(float(said[0]))

    def _share(self, mark: float) -> float:
        return (mark - self.worst) / (self.best - self.worst)

    def _marks(self, text: str, positions: Sequence[Probabilities]) -> dict[int, float]:
        """The probability of each mark.

        A tokenizer that writes digits singly (Qwen's) begins 1 and 10 with the same token.
        Where that token was said, the next position tells the two apart; where it was not,
        nothing does, and its mass is left out.
        """
        if not positions:
            return {}
        first = positions[0]
        marks = {m: first[str(m)] for m in range(self.worst, self.best + 1) if str(m) in first}
        if self.best == 10 and 1 in marks and 10 not in marks:
            one = marks.pop(1)
            if text.strip().startswith("1"):
                following = positions[1] if len(positions) > 1 else {}
                marks[10] = one * following.get("0", 0.0)
                marks[1] = one - marks[10]
        return marks


class Reasoned:
    """The least mark of an answer that gives its reasons first, from worst to best as 0 to 1.

    The form of VIEScore and EditScore: {"reasoning": "...", "score": [7, 9]}.
    """

    max_tokens, logprobs = 512, False

    def __init__(self, worst: int, best: int) -> None:
        self.worst, self.best = worst, best
        self.instruction = (
            f"Marks are whole numbers from {worst} (worst) to {best} (best). Give your reasons in "
            'a sentence or two, then the mark, as JSON: {"reasoning": "...", "score": [...]}'
        )

    def read(self, choice: Any) -> float:
        text, _ = _parts(choice)
        marks = _scores(text)
        if not marks or not all(self.worst <= mark <= self.best for mark in marks):
            raise Unscored(f"no marks from {self.worst} to {self.best}: it ends {text[-80:]!r}")
        return (min(marks) - self.worst) / (self.best - self.worst)


_WITHIN = {"yes_no": None, "scale": (1, 10), "reasoned": (0, 10)}  # each reading's own scale


def find_reading(name: str, scale: Sequence[int] | None) -> Reading:
    """`scale`: the worst and the best mark; None: the reading's own. Raises UserError."""
    if name not in _WITHIN:
        raise UserError(f"judge reading {name!r}: allowed are {', '.join(_WITHIN)}")
    if scale is None:
        scale = _WITHIN[name]
    elif name == "yes_no":
        raise UserError(f"judge scale {scale!r}: reading yes_no has no marks, leave it out")
    if scale is None:
        return YesNo()
    whole = isinstance(scale, list | tuple) and all(type(mark) is int for mark in scale)
    if not whole or len(scale) != 2 or not 0 <= scale[0] < scale[1] <= 100:
        raise UserError(
            f"judge scale {scale!r}: give the worst and the best mark, two whole numbers of 0 to "
            "100 like [0, 10]"
        )
    return {"scale": Scale, "reasoned": Reasoned}[name](*scale)


def choices(answer: Any, count: int) -> list[Any]:
    """Of a chat completion. Raises Unscored for fewer than were asked for."""
    try:
        found = list(answer["choices"])
    except (KeyError, TypeError) as error:
        raise Unscored(f"not a chat completion: {str(answer)[:80]!r}") from error
    if len(found) < count:
        raise Unscored(f"{len(found)} of {count} draws: the endpoint takes no `n` so large")
    return found


def _scores(text: str) -> list[float]:
    """The `score` of the JSON object in a text, a mark or a list of them; none where unreadable."""
    begin, end = text.find("{"), text.rfind("}")
    try:
        told = json.loads(text[begin : end + 1])["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    marks = told if isinstance(told, list) else [told]
    return marks if all(type(mark) in (int, float) for mark in marks) else []


def _parts(choice: Any) -> tuple[str, list[Probabilities]]:
    """A choice's text, and the probabilities at each position it tells of."""
    try:
        text = choice["message"]["content"] or ""
        content = (choice.get("logprobs") or {}).get("content") or []
        return text, [_probabilities(position) for position in content]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unscored(f"not a chat completion: {str(choice)[:80]!r}") from error


def _probabilities(position: Mapping[str, Any]) -> Probabilities:
    """Spellings that differ in case and white space (` Yes`, `yes`) are one."""
    merged: Probabilities = defaultdict(float)
    for token in position.get("top_logprobs") or []:
        merged[token["token"].strip().lower()] += math.exp(token["logprob"])
    return dict(merged)
