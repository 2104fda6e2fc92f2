"""Pictures as a viewer shows them: the one place where files and bytes become RGB."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from duet.configs.errors import UserError

MAX_PIXELS = 2**26  # 8,192 x 8,192: 200 MB as RGB
# what datasets hold; others that Pillow opens start programs (EPS) or have no one look (PDF)
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
Stored = str | Path | bytes | Image.Image
T = TypeVar("T")

# what is above Pillow's warning is refused here, in one line
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_picture(stored: Stored) -> Image.Image:
    """The first frame of a picture in RGB.

    Raises UserError for what is no whole picture of FORMATS, or has more than MAX_PIXELS.
    """
    return _look(stored, as_shown)


def shown_size(stored: Stored) -> tuple[int, int]:
    """Width and height that `read_picture` will give, without decoding. Raises as it does."""
    return _look(stored, _turned_size)


def is_see_through(stored: Stored) -> bool:
    """Whether any pixel is transparent, be it in part. Raises as `read_picture` does."""
    return _look(stored, _has_clear_pixels)


def _look(stored: Stored, at: Callable[[Image.Image], T]) -> T:
    name = _name(stored)
    try:
        if isinstance(stored, Image.Image):
            return at(stored)
        Image.init()
        source = io.BytesIO(stored) if isinstance(stored, bytes) else stored
        with Image.open(source, formats=[f for f in FORMATS if f in Image.OPEN]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                width, height = picture.size
                raise UserError(f"{name} has {width} x {height} pixels: allowed are {MAX_PIXELS}")
            return at(picture)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise anything over a damaged file
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def as_shown(picture: Image.Image) -> Image.Image:
    """RGB: turned as EXIF says, in sRGB, 16 bits scaled to 8, transparency over white.

    Raises ValueError for a mode whose range nobody can know.
    """
    picture = ImageOps.exif_transpose(picture)
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    opaque = _in_srgb(_opaque(picture))
    if alpha is None:
        return opaque
    white = Image.new("RGB", picture.size, "white")
    white.paste(opaque, mask=alpha)
    return white


def _turned_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    lying = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if lying else (width, height)


def _has_clear_pixels(picture: Image.Image) -> bool:
    if not picture.has_transparency_data:
        return False
    return picture.convert("RGBA").getchannel("A").getextrema()[0] < 255


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred part of that shape, resampled to it: cropped, never squashed."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def is_cropped(picture: Image.Image, width: int, height: int) -> bool:
    """Whether `fit` cuts off a pixel or more."""
    return not -width < picture.width * height - picture.height * width < height


def _name(stored: Stored) -> str:
    if isinstance(stored, bytes):
        return f"a picture of {len(stored)} bytes"
    if isinstance(stored, Image.Image):
        return f"a picture of mode {stored.mode}"
    return f"picture {str(stored)!r}"


def _opaque(picture: Image.Image) -> Image.Image:
    """In L, RGB or CMYK: those that a colour profile is made for."""
    if picture.mode.startswith("I;16"):
        return picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} has no known range: save it with 8 or 16 bits")
    if picture.mode in ("L", "RGB", "CMYK"):
        return picture
    return (picture.convert("RGBA") if picture.has_transparency_data else picture).convert("RGB")


def _in_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            return ImageCms.profileToProfile(
                picture, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except ImageCms.PyCMSError:
            pass  # viewers, too, leave out a profile that does not fit its picture
    return picture.convert("RGB")
