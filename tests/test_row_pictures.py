"""Pictures of rows: read as a viewer shows them, by one function everywhere, or refused."""

import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.configs.pictures import fit, is_cropped, read_picture
from duet.configs.row import Row
from duet.configs.rows import load_rows, rows_of
from duet.configs.schema import RewardConfig
from duet.inference.layout import Size
from duet.inference.pictures import encode_prior
from duet.rewards.base import RewardInput
from duet.rewards.registry import load_rewards
from duet.rewards.view import low
from tests.conftest import CLIP, ROOT
from tests.pictures import CLEAN

ORIENTATION = 0x0112
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def saved(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def half_clear(picture: Image.Image) -> Image.Image:
    """Its right half transparent, over a colour that nobody is to see."""
    clear = picture.convert("RGBA")
    clear.paste((255, 0, 0, 0), (picture.width // 2, 0, *picture.size))
    return clear


def turned(picture: Image.Image, form: str) -> bytes:
    """Stored lying down, with the word that turns it back."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(picture.transpose(Image.Transpose.ROTATE_90), form, exif=exif)


def sixteen_bits(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


MODES = {
    "1": lambda: saved(CLEAN.convert("1")),
    "L": lambda: saved(CLEAN.convert("L")),
    "LA": lambda: saved(half_clear(CLEAN).convert("LA")),
    "P": lambda: saved(CLEAN.quantize(16)),
    "P, transparent": lambda: saved(half_clear(CLEAN).quantize(16)),
    "P, one colour transparent": lambda: saved(CLEAN.quantize(16), transparency=3),
    "RGBA": lambda: saved(half_clear(CLEAN)),
    "RGBA in WebP": lambda: saved(half_clear(CLEAN), "WEBP", lossless=True, exact=True),
    "I;16": lambda: saved(sixteen_bits(CLEAN)),
    "I;16 in TIFF": lambda: saved(sixteen_bits(CLEAN), "TIFF"),
    "CMYK": lambda: saved(CLEAN.convert("CMYK"), "TIFF"),
    "CMYK in JPEG": lambda: saved(CLEAN.convert("CMYK"), "JPEG", quality=95),
    "EXIF in JPEG": lambda: turned(CLEAN, "JPEG"),
    "EXIF in PNG": lambda: turned(CLEAN, "PNG"),
    "animated": lambda: saved(CLEAN, "GIF", save_all=True, append_images=[Image.new("RGB", CLEAN.size)]),
    "profile of another mode": lambda: saved(CLEAN.convert("L"), icc_profile=srgb()),
    "broken profile": lambda: saved(CLEAN, icc_profile=b"junk"),
}  # fmt: skip


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def likeness():
    """Scores of fidelity and source consistency of a picture to itself as its row has it."""
    names = ("fidelity", "source_consistency")
    args = {"model": CLIP, "pretrained": None, "device": "cpu"}
    rewards = load_rewards([RewardConfig(name, args=args) for name in names])

    def score(shown: Image.Image, stored) -> list[float]:
        item = RewardInput(shown, "a card", Row({"image": stored, "source": stored}))
        return [reward([item])[0] for reward in rewards.values()]

    return score


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_against_itself_scores_one(tmp_path, likeness, mode):
    data = MODES[mode]()
    (tmp_path / "picture").write_bytes(data)
    shown = read_picture(tmp_path / "picture")
    assert shown.mode == "RGB" and shown.size == CLEAN.size
    for stored in (str(tmp_path / "picture"), data, Image.open(io.BytesIO(data))):
        assert likeness(shown, stored) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_read_as_a_viewer_shows_it(mode):
    """Near the RGB picture it was made from: what a wrong reading would not be."""
    expected = CLEAN
    if mode in ("LA", "RGBA", "P, transparent", "RGBA in WebP"):
        expected = CLEAN.copy()
        expected.paste("white", (CLEAN.width // 2, 0, *CLEAN.size))
    if mode.startswith(("1", "L", "I;16", "profile of")):
        expected = expected.convert("L")
    seen = np.asarray(read_picture(MODES[mode]()), dtype=float)
    error = np.abs(seen - np.asarray(expected.convert("RGB"))).mean()
    if mode == "1":
        assert set(np.unique(seen)) == {0, 255}
    elif mode == "P, one colour transparent":
        hidden = np.asarray(CLEAN.quantize(16)) == 3
        assert (seen[hidden] == 255).all() and hidden.any()
    else:
        assert error < 6


def test_sixteen_bits_are_scaled_to_eight():
    ramp = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    for form in ("PNG", "TIFF"):
        seen = np.asarray(read_picture(saved(ramp, form)))[..., 0]
        assert (seen.ravel() == np.arange(256)).all()


def test_a_colour_profile_is_minded():
    swapped = srgb().replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    for picture in (Image.new("RGB", (8, 8), RED), Image.new("RGBA", (8, 8), (*RED, 255))):
        assert read_picture(saved(picture)).getpixel((4, 4)) == RED
        seen = read_picture(saved(picture, icc_profile=swapped)).getpixel((4, 4))
        assert np.abs(np.subtract(seen, BLUE)).max() <= 2
    same = np.asarray(read_picture(saved(CLEAN, icc_profile=srgb())), dtype=float)
    assert np.abs(same - np.asarray(CLEAN)).max() <= 2


def png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel that tells its size and holds a line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    line = zlib.compress(bytes(1 + (width + 7) // 8))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", line) + chunk(b"IEND", b"")


DAMAGED = {
    "0 bytes": (lambda: b"", "cannot be read: it is none of PNG"),
    "text": (lambda: b"no picture", "cannot be read: it is none of PNG"),
    "truncated PNG": (lambda: saved(CLEAN)[:-200], "cannot be read: image file is truncated"),
    "truncated JPEG": (lambda: saved(CLEAN, "JPEG")[:-200], "cannot be read: image file is truncated"),
    "a flipped byte": (lambda: saved(CLEAN).replace(b"IDAT", b"IDAT\xff", 1), "cannot be read: "),
    "100 megapixels": (lambda: png(10_000, 10_000), "has 10000 x 10000 pixels: allowed are 67108864"),
    "400 megapixels": (lambda: png(20_000, 20_000), "cannot be read: Image size (400000000 pixels)"),
    "a program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of PNG"),
    "floats": (lambda: saved(Image.new("F", (8, 8)), "TIFF"), "mode F has no known range"),
    "32 bits": (lambda: saved(Image.new("I", (8, 8)), "TIFF"), "mode I has no known range"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_picture_is_told_by_file_and_line(tmp_path, name):
    make, message = DAMAGED[name]
    (tmp_path / "picture.png").write_bytes(make())
    lines = [{"prompt": "a"}, {"prompt": "b", "image": "picture.png"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as caught:
        load_rows(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:2: image: picture ") and message in told
    assert "\n" not in told


def stripes(width: int, height: int) -> Image.Image:
    """Red, with a blue square of 40 pixels in the middle and white edges left and right."""
    picture = Image.new("RGB", (width, height), RED)
    for x in (0, width - 30):
        picture.paste(WHITE, (x, 0, x + 30, height))
    middle = ((width - 40) // 2, (height - 40) // 2)
    picture.paste(BLUE, (*middle, middle[0] + 40, middle[1] + 40))
    return picture


def test_another_shape_is_cropped_in_the_middle_and_never_squashed():
    seen = np.asarray(fit(stripes(240, 80), 96, 64), dtype=int)
    blue = (seen[..., 2] > 128) & (seen[..., 0] < 128)
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert len(rows) == len(columns) == 32  # 40 pixels at 64 / 80: still a square
    assert rows[0] == 16 and columns[0] == 32  # in the middle
    assert not (seen.min(-1) > 200).any()  # the white edges are cut off
    same = fit(CLEAN, *CLEAN.size)
    assert same.tobytes() == CLEAN.tobytes()


@pytest.mark.parametrize(
    ("size", "cropped"),
    [((96, 64), False), ((960, 640), False), ((1000, 667), False), ((96, 96), True), ((97, 64), True), ((1, 1), False)],
)  # fmt: skip
def test_a_shape_is_the_runs_up_to_a_pixel(size, cropped):
    assert is_cropped(Image.new("L", size), 96, 64) == cropped


def test_rewards_and_the_policy_see_the_same_crop(pipeline):
    wide, size = stripes(240, 80), Size(64, 96)
    item = RewardInput(CLEAN, "a", {"image": saved(wide)})
    expected = fit(wide, 96, 64)
    assert item.picture("image").tobytes() == expected.tobytes()
    through = replace(item, image=low(CLEAN), look=low, size=CLEAN.size)
    assert through.picture("image").tobytes() == low(expected).tobytes()
    codes = encode_prior(pipeline, wide, size).tolist()
    assert codes == encode_prior(pipeline, expected, size).tolist()
    assert codes != encode_prior(pipeline, wide.resize((96, 64)), size).tolist()


def test_another_shape_is_refused_where_that_is_set(tmp_path):
    stripes(240, 80).save(tmp_path / "wide.png")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "image": "wide.png"}\n')
    overrides = [f"data.train={path}"]
    config = load_config(ROOT / "configs" / "tiny" / "ar.yaml", overrides)
    assert len(rows_of(config, "train")) == 2
    config = load_config(ROOT / "configs" / "tiny" / "ar.yaml", [*overrides, "data.fit=refuse"])
    with pytest.raises(UserError, match=r"rows.jsonl:2: image has 240 x 80 pixels, another shape"):
        rows_of(config, "train")
