"""The rows that memory and time are planned for: text, and the edit with the most source tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

from duet.configs.row import Row
from duet.inference.layout import Size
from duet.inference.shapes import Sizes, image_processor
from duet.inference.sources import source_sizes


@dataclass(frozen=True)
class Kinds:
    """Of a dataset's rows, those that may need most."""

    text: bool = True  # whether a row has no sources
    edit: tuple[Size, ...] = ()  # the sources of the largest edit; none: there is no edit

    @classmethod
    def of(cls, rows: Iterable[Row], sizes: Sizes) -> "Kinds":
        """Raises UserError, with the row's place, for a source that cannot be served."""
        processor = image_processor(sizes)
        found = {source_sizes(processor, row) for row in rows} or {()}
        return cls(() in found, max(found, key=_tokens))

    def single(self) -> "list[Kinds]":
        """Each by itself: no batch of the sampler mixes them."""
        if self.text and self.edit:
            return [Kinds(), Kinds(False, self.edit)]
        return [self]

    def __str__(self) -> str:
        if not self.edit:
            return "none"
        grids = dict.fromkeys(f"{s.grid.height} x {s.grid.width}" for s in self.edit)
        plural = "s" if len(self.edit) > 1 else ""
        return f"up to {len(self.edit)} source{plural} of {' and '.join(grids)} tokens"


def _tokens(sources: tuple[Size, ...]) -> int:
    return sum(size.grid.count for size in sources)


@dataclass(frozen=True)
class Datasets:
    """Those of a run."""

    train: Kinds = Kinds()
    eval: Kinds = Kinds()
