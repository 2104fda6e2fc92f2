"""The prior tokens that a decoder's groups are given: sampled by the AR, or encoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from duet.configs.errors import UserError
from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.request import Request


@dataclass(frozen=True)
class Priors:
    """All that a decoder's run needs of the AR for a row."""

    tokens: Tensor  # int64 [N, h * w]
    sources: tuple[Tensor, ...]  # int64 [h' * w'], of each source of the row


def is_encoded(source: str, row: Row) -> bool:
    """`source`: as `rollout.priors` has it."""
    return source == "reference" or (source == "auto" and "image" in row)


def require_references(config: RunConfig, rows: Sequence[Row]) -> None:
    """Raises UserError, with its place, for a row that lacks the picture to encode."""
    if config.stage != "decoder" or config.rollout.priors != "reference":
        return
    for row in rows:
        if "image" not in row:
            raise UserError(
                f"{row.where} has no image to encode: give one in every row where "
                "rollout.priors = 'reference', or take 'auto', which samples where there is none"
            )


def make_priors(
    engine: Engine,
    size: Size,
    source: str,
    rows: Sequence[Row],
    seeds: Sequence[tuple[int, ...]],
) -> list[Priors]:
    """For each row a prior for each of its seeds; N is 1 where it is encoded."""
    asked = [
        engine.ready(Request(row["prompt"], own, size, row.sources))
        for row, own in zip(rows, seeds, strict=True)
    ]
    pairs = list(zip(rows, asked, strict=True))
    drawn = iter(engine.priors([r for row, r in pairs if not is_encoded(source, row)]))
    return [
        Priors(
            engine.encode_prior(row.picture("image"), size)[None]
            if is_encoded(source, row)
            else next(drawn),
            request.source_tokens or (),
        )
        for row, request in pairs
    ]
