"""Pictures as base64 text: PNG or WebP, both without loss."""

import base64
import io
from typing import Any

from PIL import Image

MAX_PIXELS = 2**27  # of all pictures of a request: 128 of 1024 x 1024, 400 MB as RGB
SAVE = {"png": {"compress_level": 1}, "webp": {"lossless": True, "exact": True, "quality": 0}}


class WireError(ValueError):
    """What arrived is not of the form that rewards/service/wire.py tells."""


def encode_picture(picture: Image.Image, image_format: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **SAVE[image_format])
    return base64.b64encode(buffer.getvalue()).decode()


class PictureReader:
    """Decodes the pictures of one request, never more than MAX_PIXELS in all."""

    def __init__(self) -> None:
        self.pixels = 0

    def read(self, text: Any, where: str) -> tuple[Image.Image, bytes]:
        """The picture and the bytes of its file; WireError names `where`."""
        try:
            data = base64.b64decode(text, validate=True)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))  # the header only
            self.pixels += picture.width * picture.height
            if self.pixels <= MAX_PIXELS:
                picture.load()
        except (OSError, ValueError, TypeError, SyntaxError, EOFError) as error:
            raise WireError(f"{where} is no base64 PNG or WebP: {error}") from error
        except Image.DecompressionBombError:
            self.pixels = MAX_PIXELS + 1
        if self.pixels > MAX_PIXELS:
            raise WireError(f"{where} is too large: a request holds at most {MAX_PIXELS} pixels")
        return picture, data
