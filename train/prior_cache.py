"""Prior tokens on the disk: FOLDER/priors with a stamp, parts of some rows each, and digests.

While it is made it bears another name, as each part does while it is written: what has its name
is whole, and a making that was interrupted goes on with the parts that it lacks.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from duet.configs.digests import Damaged, check_digests
from duet.configs.errors import UserError, first_line
from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.train.prior_stamp import Stamp, differences
from duet.train.prior_tokens import Priors
from duet.train.prompts import Group

ROWS = 16  # of a part
_STAMP = "stamp.json"


@dataclass(frozen=True)
class PriorCache:
    """Parts `priors-N.safetensors`: by the row's index the priors of each of its rows, int32
    [N, h * w]; as `INDEX.sources.I` the tokens of its source I, int32 [h' * w']."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig) -> "PriorCache | None":
        """The one that a run reads from; None where it makes its priors itself."""
        cached = config.stage == "decoder" and config.rollout.prior_cache is not None
        return cls(Path(config.rollout.prior_cache) / "priors") if cached else None

    def prior(self, group: Group) -> Priors:
        """One. Epoch by epoch a row's next one, after the last the first again: for as many
        epochs as there are priors, what a run without a cache would make.

        Raises Damaged.
        """
        kept = self.read(group.index)
        place = group.epoch % len(kept.tokens)
        return replace(kept, tokens=kept.tokens[place : place + 1])

    def read(self, row: int) -> Priors:
        """Of the row with that index. Raises Damaged."""
        path = self._part(row // ROWS)
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                count = sum(name.startswith(f"{row}.sources.") for name in names)
                sources = (file.get_tensor(_source(row, i)).long() for i in range(count))
                return Priors(file.get_tensor(str(row)).long(), tuple(sources))
        except (OSError, SafetensorError) as error:
            raise Damaged(f"prior tokens in {str(path)!r} cannot be read: {error}") from error

    def write(self, part: int, priors: Sequence[Priors]) -> None:
        """A part: the priors of its rows."""
        named = {}
        for row, made in enumerate(priors, part * ROWS):
            named[str(row)] = made.tokens
            named |= {_source(row, i): tokens for i, tokens in enumerate(made.sources)}
        _write(self._part(part), save({n: t.to(torch.int32) for n, t in named.items()}))

    def _part(self, number: int) -> Path:
        return self.folder / f"priors-{number:06d}.safetensors"

    def stamp(self) -> Stamp:
        """Raises Damaged."""
        try:
            return json.loads((self.folder / _STAMP).read_text())
        except (OSError, ValueError) as error:
            raise Damaged(f"{_STAMP} cannot be read: {first_line(error)}") from error

    def write_stamp(self, stamp: Stamp) -> None:
        _write(self.folder / _STAMP, json.dumps(stamp, indent=1).encode())


def _source(row: int, place: int) -> str:
    return f"{row}.sources.{place}"


def _write(path: Path, content: bytes) -> None:
    """Under another name, synced to the disk, then renamed: whole or not there.

    Raises UserError where it cannot be.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise UserError(
            f"prior tokens cannot be written to {str(path)!r} ({error.strerror}): what was made "
            "is kept, `duet priors CONFIG` goes on with it"
        ) from error


def check_cache(config: RunConfig, stamp: Stamp, rows: Sequence[Row]) -> None:
    """The run's cache is finished, whole, and made from what `stamp` tells of the run.

    Raises UserError.
    """
    cache, name = PriorCache.of(config), f"rollout.prior_cache = {config.rollout.prior_cache!r}"
    if not cache.folder.exists():
        raise UserError(
            f"{name} holds no finished prior tokens: make them with `duet priors CONFIG`"
        )
    try:
        check_digests(cache.folder)
        made = cache.stamp()
    except Damaged as error:
        raise UserError(
            f"{name} is damaged ({error}): remove {str(cache.folder)!r} and make it again with "
            "`duet priors CONFIG`"
        ) from error
    require_same(name, made, stamp, config, rows)


def require_same(
    name: str, made: Stamp, now: Stamp, config: RunConfig, rows: Sequence[Row]
) -> None:
    """Raises UserError that names all that differs."""
    stale = "; ".join(differences(made, now, config, rows))
    if stale:
        raise UserError(
            f"{name} is stale: {stale}: make another with "
            "`duet priors CONFIG rollout.prior_cache=ANOTHER_FOLDER`"
        )
