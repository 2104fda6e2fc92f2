"""Pictures as base64 text: PNG or WebP, both without loss."""

import base64
import io
from typing import Any

from PIL import Image

# Measured at 2048 x 2048, bytes a pixel while a picture is scored: fidelity 106, brisque 69,
# ocr 32, alignment 4; of a long thin one CLIP and OCR first enlarge the shorter side.
MAX_PICTURE = 2**23  # pixels: 4K (3840 x 2160) and 0.9 GB
MAX_ASPECT = 16  # longer side to shorter
MAX_PIXELS = 2**26  # of all pictures of a request: 64 of 1024 x 1024, 200 MB as RGB, held twice
SAVE = {"png": {"compress_level": 1}, "webp": {"lossless": True, "exact": True, "quality": 0}}


class WireError(ValueError):
    """What arrived is not of the form that rewards/service/wire.py tells."""


def encode_picture(picture: Image.Image, image_format: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **SAVE[image_format])
    return base64.b64encode(buffer.getvalue()).decode()


class PictureReader:
    """Decodes the pictures of one request: bounds for each, and MAX_PIXELS in all."""

    def __init__(self) -> None:
        self.pixels = 0

    def read(self, text: Any, where: str) -> tuple[Image.Image, bytes]:
        """The picture and the bytes of its file; WireError names `where`."""
        try:
            data = base64.b64decode(text, validate=True)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))  # the header only
            self._require_size(picture.size, where)
            picture.load()
        except WireError:
            raise
        except (OSError, ValueError, TypeError, SyntaxError, EOFError) as error:
            raise WireError(f"{where} is no base64 PNG or WebP: {error}") from error
        except Image.DecompressionBombError as error:
            raise WireError(f"{where} is too large: {error}") from error
        return picture, data

    def _require_size(self, size: tuple[int, int], where: str) -> None:
        short, long = sorted(size)
        told = f"{where} of {size[0]} x {size[1]} pixels"
        self.pixels += short * long
        if short * long > MAX_PICTURE:
            raise WireError(f"{told} is too large: at most {MAX_PICTURE} pixels are allowed")
        if long > MAX_ASPECT * short:
            raise WireError(f"{told} is too long: at most {MAX_ASPECT} : 1 is allowed")
        if self.pixels > MAX_PIXELS:
            raise WireError(f"{told} is too much: a request holds at most {MAX_PIXELS} pixels")
