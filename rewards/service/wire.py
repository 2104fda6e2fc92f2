"""The JSON that travels between the `remote` reward and `duet rewards serve`.

    POST /score/NAME  {"version": 3,
                       "samples": [{"prompt": "a card", "row": {...}, "image": BASE64,
                                    "pictures": {"style": BASE64}, "sources": [BASE64]}]}
    200               {"version": 3, "scores": [0.5, null, "nan"]}
                      null: does not apply; "nan": could not be scored
    any other status  {"error": "one line"}

    GET /health       {"version": 3, "ready": true, "authorised": true,
                       "rewards": {"ocr": {"whole_groups": false}}}
                      whether weights are loaded; whether this request has the token

The row's own pictures travel as the reward would see them (`RewardInput.picture` and `.sources`);
the paths that named them stay at home. `keep` travels as a mask, a `style` that is the place of a
source as that picture, and `subjects` as boxes in the sources that are sent. The first source is
among `pictures`, too, where the picture's size or view shows it otherwise. Version 1 told no None,
version 2 had no sources.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import as_shown, shown_size
from duet.configs.regions import read_box
from duet.configs.row import PICTURES
from duet.configs.row_edits import SOURCE, SOURCES, SUBJECTS
from duet.rewards.answers import Answer
from duet.rewards.base import RewardInput
from duet.rewards.service.http import excerpt
from duet.rewards.service.pictures import PictureReader, WireError, encode_picture

VERSION = 3
NOT_SCORED = "nan"
TOKEN_ENV = "DUET_REWARDS_TOKEN"


def read_token(variable: str) -> str | None:
    """The bearer token in that environment variable; None where it is not set."""
    token = os.environ.get(variable)
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise UserError(
            f"environment variable {variable} holds no token: "
            "give printable ASCII on one line, or unset it"
        )
    return token


def encode_request(inputs: Sequence[RewardInput], image_format: str) -> bytes:
    """Raises UserError for a row with a value that JSON cannot carry."""
    samples = [_encode_sample(item, image_format) for item in inputs]
    return json.dumps({"version": VERSION, "samples": samples}).encode()


def _encode_sample(item: RewardInput, image_format: str) -> dict[str, Any]:
    pictures = {key: item.picture(key) for key in PICTURES}
    sources = item.sources
    if sources and _alike(sources[0], pictures[SOURCE]):
        pictures[SOURCE] = None
    left_out = {*PICTURES, SOURCES, SUBJECTS}  # paths and bytes of this machine
    row = {k: _plain(k, v) for k, v in item.row.items() if k not in left_out}
    if sources:
        row[SUBJECTS] = [box and list(box.sides) for box in item.subjects(sources)]
    return {
        "prompt": item.prompt,
        "row": row,
        "image": encode_picture(item.image, image_format),
        "pictures": {k: encode_picture(p, image_format) for k, p in pictures.items() if p},
        "sources": [encode_picture(source, image_format) for source in sources],
    }


def _alike(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def _plain(key: str, value: Any) -> Any:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(
            f"row key {key!r} holds a {type(value).__name__} that JSON cannot carry to a remote "
            "reward: use strings, finite numbers, true, false, null, lists and objects"
        )
    return value


def decode_request(body: bytes, folder: Path) -> list[RewardInput]:
    """The samples of a request; their rows' pictures become files in `folder`.

    Raises WireError for anything but the form above, naming the field.
    """
    fields = _fields(_load(body, "the request"), "the request", {"samples": list})
    if not fields["samples"]:
        raise WireError("samples is empty")
    reader = PictureReader()
    return [_sample(s, f"samples[{i}]", reader, folder) for i, s in enumerate(fields["samples"])]


def _sample(sample: Any, where: str, reader: PictureReader, folder: Path) -> RewardInput:
    kinds = {"prompt": str, "row": dict, "image": str, "pictures": dict, "sources": list}
    fields = _fields(sample, where, kinds)
    image = as_shown(reader.read(fields["image"], f"{where}.image")[0])
    row = dict(fields["row"])
    for key in (*PICTURES, SOURCES):
        if row.get(key) is not None:  # a path would open a file of the server
            raise WireError(f"{where}.row has {key!r}: send that picture in {where}.pictures")

    def stored(text: Any, name: str) -> str:
        picture, data = reader.read(text, f"{where}.{name}")
        path = folder / f"{where}-{name}.{picture.format.lower()}"
        path.write_bytes(data)
        return str(path)

    for key, text in fields["pictures"].items():
        if key not in PICTURES:
            raise WireError(f"{where}.pictures has {key!r}: allowed are {', '.join(PICTURES)}")
        row[key] = stored(text, f"pictures.{key}")
    if fields["sources"]:
        row[SOURCES] = [stored(t, f"sources[{i}]") for i, t in enumerate(fields["sources"])]
        _require_subjects(row, f"{where}.row.{SUBJECTS}")
    return RewardInput(image, fields["prompt"], row)


def _require_subjects(row: Mapping[str, Any], where: str) -> None:
    boxes, sources = row.get(SUBJECTS), row[SOURCES]
    if not isinstance(boxes, list) or len(boxes) != len(sources):
        raise WireError(f"{where} must be a list of one box or null for each of the sources")
    for i, (box, source) in enumerate(zip(boxes, sources, strict=True)):
        try:
            if box is not None:
                read_box(f"{where}[{i}]", box, shown_size(source))
        except UserError as error:
            raise WireError(str(error)) from error


def encode_scores(scores: Sequence[Answer]) -> dict[str, Any]:
    told = [NOT_SCORED if s is not None and math.isnan(s) else s for s in scores]
    return {"version": VERSION, "scores": told}


def decode_scores(body: bytes, count: int) -> list[Answer]:
    """Scores of `count` samples, NaN where not scored, None where the reward does not apply.

    Raises WireError for another count, and for anything but finite numbers, null and "nan".
    """
    scores = _fields(_load(body, "the answer"), "the answer", {"scores": list})["scores"]
    if len(scores) != count:
        raise WireError(f"{len(scores)} scores for {count} samples")
    return [_score(value) for value in scores]


def _score(value: Any) -> Answer:
    if value is None:
        return None
    if value == NOT_SCORED:
        return math.nan
    if type(value) not in (int, float) or abs(value) > sys.float_info.max:
        raise WireError(
            f"{str(value)[:40]!r} is no score: finite numbers, null and {NOT_SCORED} are"
        )
    return float(value)


@dataclass(frozen=True)
class Health:
    ready: bool  # weights are loaded
    authorised: bool  # the request had the server's token, or needs none
    whole_groups: dict[str, bool]  # by the name of each reward that is served


def encode_health(health: Health) -> dict[str, Any]:
    rewards = {name: {"whole_groups": whole} for name, whole in health.whole_groups.items()}
    ready, authorised = health.ready, health.authorised
    return {"version": VERSION, "ready": ready, "authorised": authorised, "rewards": rewards}


def decode_health(body: bytes) -> Health:
    """Raises WireError for anything but the form above."""
    kinds = {"ready": bool, "authorised": bool, "rewards": dict}
    fields = _fields(_load(body, "the health page"), "the health page", kinds)
    whole_groups = {
        name: _fields(reward, f"rewards.{name}", {"whole_groups": bool})["whole_groups"]
        for name, reward in fields["rewards"].items()
    }
    return Health(fields["ready"], fields["authorised"], whole_groups)


def _load(body: bytes, where: str) -> Any:
    """Without its version. Raises WireError for another one."""

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is no JSON")

    try:
        tree = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON ({error}): it begins {excerpt(body)}") from error
    if not isinstance(tree, dict):
        return tree
    version = tree.pop("version", 1)
    if version != VERSION:
        raise WireError(
            f"{where} is in version {version!r:.20} of the wire form, and here it is {VERSION}: "
            "run the same version of duet on both sides"
        )
    return tree


def _fields(tree: Any, where: str, kinds: dict[str, type]) -> dict[str, Any]:
    if not isinstance(tree, dict) or set(tree) != set(kinds):
        raise WireError(f"{where} must be an object of {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(tree[key], kind):
            raise WireError(f"{where}.{key} must be of type {kind.__name__}")
    return tree
