"""How a judge's answer becomes a score: by its log-probabilities, else by its text."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Probabilities = dict[str, float]  # of the most likely tokens at one position, bare and lower case


class Unscored(ValueError):
    """A sample without a readable answer; the message tells why."""


class YesNo:
    """P(yes) / (P(yes) + P(no)) of the first token; by the text, 1 or 0."""

    instruction = "Answer with one word: yes or no."

    @staticmethod
    def read(answer: Any) -> float:
        text, positions = _parts(answer)
        first = positions[0] if positions else {}
        yes, no = first.get("yes", 0.0), first.get("no", 0.0)
        if yes + no > 0:
            return yes / (yes + no)
        said = set(re.findall(r"\b(yes|no)\b", text.lower()))
        if len(said) != 1:
            raise Unscored(f"neither yes nor no: {text[:80]!r}")
        return float(said == {"yes"})


class Scale:
    """The expected mark of 1 to 10, or the mark in the text, as (mark - 1) / 9."""

    instruction = "Answer with one whole number from 1 (worst) to 10 (best)."

    @staticmethod
    def read(answer: Any) -> float:
        text, positions = _parts(answer)
        marks = _marks(text, positions)
        total = sum(marks.values())
        if total > 0:
            return (sum(m * p for m, p in marks.items()) / total - 1) / 9
        said = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(/|out of)\s*10\b", "", text))
        if len(said) != 1 or not 1 <= float(said[0]) <= 10:
            raise Unscored(f"no single mark from 1 to 10: {text[:80]!r}")
        return (float(said[0]) - 1) / 9


READINGS = {"yes_no": YesNo, "scale": Scale}


def _marks(text: str, positions: Sequence[Probabilities]) -> dict[int, float]:
    """The probability of each mark.

    A tokenizer that writes digits singly (Qwen's) begins 1 and 10 with the same token.
    Where that token was said, the next position tells the two apart; where it was not,
    nothing does, and its mass is left out.
    """
    if not positions:
        return {}
    first = positions[0]
    marks = {m: first[str(m)] for m in range(1, 11) if str(m) in first}
    if 1 in marks and 10 not in marks:
        one = marks.pop(1)
        if text.strip().startswith("1"):
            following = positions[1] if len(positions) > 1 else {}
            marks[10] = one * following.get("0", 0.0)
            marks[1] = one - marks[10]
    return marks


def _parts(answer: Any) -> tuple[str, list[Probabilities]]:
    """The text of a chat completion, and the probabilities at each position it tells of."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        content = (choice.get("logprobs") or {}).get("content") or []
        return text, [_probabilities(position) for position in content]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unscored(f"not a chat completion: {str(answer)[:80]!r}") from error


def _probabilities(position: Mapping[str, Any]) -> Probabilities:
    """Spellings that differ in case and white space (` Yes`, `yes`) are one."""
    merged: Probabilities = defaultdict(float)
    for token in position.get("top_logprobs") or []:
        merged[token["token"].strip().lower()] += math.exp(token["logprob"])
    return dict(merged)
