"""What cached prior tokens were made from: they are refused when any of it differs."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from PIL import Image

from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.train.given import Given
from duet.train.prior_tokens import is_encoded

Stamp = Mapping[str, Any]  # a setting's name, "ar", "adapter", "rows": as JSON holds it
_SETTINGS = (
    "seed",
    "sampling.height",
    "sampling.width",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.top_p",
    "rollout.priors",
    "rollout.priors_per_prompt",
    "model.dtype",
    "train.mixed_precision",
)


def make_stamp(
    config: RunConfig, rows: Sequence[Row], ar: str, begun: Given | None = None
) -> Stamp:
    """`ar`: the fingerprint of the AR's weights; `begun`: what `model.adapters` puts on them."""
    return {
        **{name: attrgetter(name)(config) for name in _SETTINGS},
        "ar": ar,
        "adapter": begun and begun.digest,
        "rows": [_digest(row, is_encoded(config.rollout.priors, row)) for row in rows],
    }


def _digest(row: Row, encoded: bool) -> str:
    """Of what its priors are made from: the prompt, or the picture by its content; and of its
    sources."""
    made_from = hashlib.sha256(_content(row["image"]) if encoded else row.prompt.encode())
    for source in row.sources:
        made_from.update(hashlib.sha256(_content(source)).digest())
    return made_from.hexdigest()


def _content(picture: str | bytes | Image.Image) -> bytes:
    if isinstance(picture, Image.Image):
        return json.dumps([picture.mode, picture.size]).encode() + picture.tobytes()
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def differences(made: Stamp, now: Stamp, config: RunConfig, rows: Sequence[Row]) -> Iterator[str]:
    """What a cache with the stamp `made` lacks to serve the run, in words."""
    for name in _SETTINGS:
        if made.get(name) != now[name]:
            yield f"{name} is {now[name]!r} and was {made.get(name)!r}"
    if made.get("ar") != now["ar"]:
        yield f"the AR of model.path = {config.model.path!r} has other weights"
    if made.get("adapter") != now["adapter"]:
        yield f"the AR of model.adapters = {list(config.model.adapters)!r} is another"
    was, are = made.get("rows", []), now["rows"]
    if len(was) != len(are):
        yield f"data.train has {len(are)} rows and had {len(was)}"
    elif was != are:
        changed = [row.where for row, a, b in zip(rows, was, are, strict=True) if a != b]
        yield f"{len(changed)} rows have changed, such as {changed[0]}"
