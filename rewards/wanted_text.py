"""The texts that a person who wrote a prompt wants to see drawn: what stands in quotation marks.

Not the glyph encoder's rule (configs/quotes.py), which is the pipeline's and must stay so:
that one takes every apostrophe for a quotation mark.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from duet.configs.quotes import quoted_spans

# what opens a quotation, and what may close it. Chinese and Japanese 《 》 name titles and are
# not here; ” opens where it closes too, as Finnish and Swedish have it
_CLOSES = {
    '"': '"', "“": "”", "”": "”", "'": "'", "‘": "’",
    "„": "“”\"", "‚": "‘’", "«": "»", "»": "«", "‹": "›", "›": "‹",
    "「": "」", "『": "』", "＂": "＂", "〝": "〟〞",
}  # fmt: skip
_SINGLE = "'’‘"  # these are apostrophes too
_DOUBTFUL = {"'": "[sS0-9]", "’": "[sS]", '"': "[0-9]", "”": "[0-9]"}  # after it: the bakers', 12"
_NEVER = "(?!)"
# scripts without spaces: a quotation mark may touch their letters
_LETTER = r"[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_ELIDED = re.compile(r"(?:n|em|til|tis|twas|cause|\d\ds?)\b", re.IGNORECASE)  # 'n', '90s


def wanted_texts(prompt: str) -> list[str]:
    """The outermost quotations in their order, a text as often as it is quoted.

    Apostrophes (don't, the bakers' window, '90s), feet and inches (5'10", a 12" pizza) open and
    close nothing. Quotation marks inside a quotation belong to the text; white space
    around it and an American comma at its end do not.
    """
    spans = (prompt[a:b].strip().removesuffix(",").rstrip() for a, b in _quotations(prompt))
    return [span for span in spans if span]


def unseen_texts(prompt: str) -> list[str]:
    """Wanted texts that the glyph encoder is not told of: the decoder can only guess at them."""
    seen = " ".join(quoted_spans(prompt))
    return [text for text in wanted_texts(prompt) if text not in seen]


def _quotations(prompt: str) -> Iterator[tuple[int, int]]:
    """Where each quoted text begins and ends."""
    place = 0
    while place < len(prompt):
        mark = _Mark(prompt, place)
        end = _end(mark) if mark.may_open else None
        if end is not None:
            yield place + 1, end
            place = end
        place += 1


def _end(opening: "_Mark") -> int | None:
    """The place of the mark that closes the quotation; None where `opening` is no quotation mark.

    Where an opening mark looks like the closing one, it can only open before it closes:
    of two that open, the first is stray.
    """
    closing, alike = _CLOSES[opening.sign], opening.sign in _CLOSES[opening.sign]
    found = re.compile(f"[{closing}]").finditer(opening.text, opening.place + 1)
    marks = (_Mark(opening.text, match.start()) for match in found)
    mark = _next(marks)
    while mark is not None:
        following = _next(marks)
        if alike and not mark.may_close:
            return None
        if mark.may_close and not (mark.doubtful and following and following.only_closes):
            return mark.place
        mark = following
    return None


def _next(marks: Iterator["_Mark"]) -> "_Mark | None":
    """The next that is no apostrophe within a word."""
    return next((mark for mark in marks if mark.may_close or mark.may_open), None)


@dataclass(frozen=True)
class _Mark:
    text: str
    place: int

    @property
    def sign(self) -> str:
        return self.text[self.place]

    @property
    def before(self) -> str:
        return self.text[self.place - 1 : self.place]

    @property
    def after(self) -> str:
        return self.text[self.place + 1 : self.place + 2]

    @property
    def may_open(self) -> bool:
        if self.sign not in _CLOSES or not self.after:
            return False
        if self.sign in _DOUBTFUL and self.after.isspace():
            return False
        if self.sign == "'":
            return not re.match(_LETTER, self.before) and not self._elided
        return not re.match(_DOUBTFUL.get(self.sign, _NEVER), self.before)

    @property
    def may_close(self) -> bool:
        if self.sign in _SINGLE and (re.match(_LETTER, self.after) or self._elided):
            return False
        return self.sign not in "'\"" or not self.before.isspace()

    @property
    def doubtful(self) -> bool:
        """An apostrophe, feet or inches, for all that its neighbours tell."""
        return bool(re.match(_DOUBTFUL.get(self.sign, _NEVER), self.before))

    @property
    def only_closes(self) -> bool:
        loose = not self.after or not re.match(r"\w", self.after)
        return self.may_close and not self.doubtful and loose

    @property
    def _elided(self) -> bool:
        if re.fullmatch("['’‘]n", self.text[max(0, self.place - 2) : self.place], re.IGNORECASE):
            return True
        found = _ELIDED.match(self.text, self.place + 1)
        if not found or self.sign not in _SINGLE:
            return False
        closed = self.text[found.end() : found.end() + 1] in tuple(_SINGLE)
        return not closed or found[0].lower() == "n"
