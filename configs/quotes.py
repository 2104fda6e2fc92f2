"""The words a prompt asks to be drawn: its quoted spans."""

import re

# GlmImagePipeline.get_glyph_texts: its kinds of quotes, in its order
_QUOTES = (r"'([^']*)'", r"\u201c([^\u201c\u201d]*)\u201d", r'"([^"]*)"', r"「([^「」]*)」")


def quoted_spans(prompt: str) -> list[str]:
    """The texts to be drawn, in the order in which the glyph encoder reads them."""
    return [span for pattern in _QUOTES for span in re.findall(pattern, prompt)]
