"""Which weights a part has, told from its files: no path, dtype to load in or device matters."""

import hashlib
import json
from pathlib import Path

from duet.configs.errors import UserError

_PIECES = 4  # of a large tensor
_PIECE_BYTES = 1024


def fingerprint(component: Path) -> str:
    """Of the safetensors of a model's component: a digest over every tensor's name, dtype, shape
    and a sample of its bytes.

    Some reads of a kilobyte a tensor: a part of 9 B parameters takes a second. Another seed, and
    training of any whole tensor, give another; a copy, a link, or other shards do not. The
    configs beside the weights are left out, since libraries rewrite them.
    Raises UserError for weights that cannot be read.
    """
    tensors: dict[str, bytes] = {}
    try:
        # a dot in the name tells a variant (model.fp16.safetensors), which is not what is loaded
        for file in sorted(p for p in component.glob("*.safetensors") if "." not in p.stem):
            tensors |= _tensors(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"weights in {str(component)!r} cannot be read: {error}") from error
    if not tensors:
        raise UserError(f"weights in {str(component)!r}: no safetensors there")
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name])
    return total.hexdigest()


def _tensors(path: Path) -> dict[str, bytes]:
    """A digest of each tensor by its name. The format: safetensors' README."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        digests = {}
        for name, tensor in header.items():
            digest = hashlib.sha256(json.dumps([tensor["dtype"], tensor["shape"]]).encode())
            for start, size in _sample(*tensor["data_offsets"]):
                file.seek(8 + length + start)
                digest.update(file.read(size))
            digests[name] = digest.digest()
    return digests


def _sample(start: int, end: int) -> list[tuple[int, int]]:
    """(start, bytes) of what is read: all, or pieces from the first to the last byte."""
    if end - start <= _PIECES * _PIECE_BYTES:
        return [(start, end - start)]
    last = end - _PIECE_BYTES
    return [(start + (last - start) * i // (_PIECES - 1), _PIECE_BYTES) for i in range(_PIECES)]
