"""How cards are drawn: a canvas of blocks and letter slots, anti-aliased."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

HEIGHT_PIXELS, WIDTH_PIXELS = 64, 96
BLOCK_PIXELS, SLOT_PIXELS, FONT_PIXELS = 32, 16, 22
SHAPE_PIXELS = 22  # a side of what stands in the middle of a block
_LINE_PIXELS = 3.5  # of an outline
_INCIRCLE_PIXELS = 6.8  # radius in the triangle
Colour = tuple[int, int, int]


class Canvas:
    """A picture of `scale` times 64 x 96 pixels, in RGB; all places in pixels at scale 1."""

    def __init__(self, background: Colour, scale: float = 1.0) -> None:
        self.scale = scale
        self.unit = scale * (4 if scale <= 1 else 1)
        size = round(WIDTH_PIXELS * self.unit), round(HEIGHT_PIXELS * self.unit)
        self.image = Image.new("RGB", size, background)
        self.pen = ImageDraw.Draw(self.image)

    def stripes(self, colour: Colour, pixels: int) -> None:
        """Horizontal, every second one of that height, from the upper edge on."""
        for top in range(0, HEIGHT_PIXELS, 2 * pixels):
            box = 0, top, WIDTH_PIXELS, top + pixels
            left, upper, right, lower = (v * self.unit for v in box)
            self.pen.rectangle((left, upper, right, lower - 1), fill=colour)

    def shape(self, kind: str, column: int, fill: Colour, inside: Colour | None = None) -> None:
        """In the column's block; with `inside` an outline around that colour."""
        self._filled(kind, column, fill, 0)
        if inside is not None:
            self._filled(kind, column, inside, _LINE_PIXELS)

    def _filled(self, kind: str, column: int, fill: Colour, inset: float) -> None:
        left, top, right, bottom = (v * self.unit for v in shape_box(column, inset))
        if kind == "circle":
            self.pen.ellipse((left, top, right, bottom), fill=fill)
        elif kind == "square":
            self.pen.rectangle((left, top, right, bottom), fill=fill)
        else:
            corners = [(x * self.unit, y * self.unit) for x, y in _triangle(column, inset)]
            self.pen.polygon(corners, fill=fill)

    def cells(self, column: int, fills: tuple[Colour, ...]) -> None:
        """Two by two of them in the column's block, row by row."""
        left, top, _, _ = shape_box(column)
        side = SHAPE_PIXELS / 2
        for i, fill in enumerate(fills):
            x, y = left + side * (i % 2), top + side * (i // 2)
            box = (v * self.unit for v in (x, y, x + side, y + side))
            self.pen.rectangle(tuple(box), fill=fill)

    def word(self, word: str, fill: Colour) -> None:
        font = _font(round(FONT_PIXELS * self.unit))
        stroke = round(0.5 * self.unit)
        for i, letter in enumerate(word):
            centre = (i + 0.5) * SLOT_PIXELS * self.unit, 1.5 * BLOCK_PIXELS * self.unit
            self.pen.text(centre, letter, font=font, fill=fill, anchor="mm", stroke_width=stroke)

    def picture(self) -> Image.Image:
        size = round(WIDTH_PIXELS * self.scale), round(HEIGHT_PIXELS * self.scale)
        return self.image.resize(size, Image.LANCZOS)


def shape_box(column: int, inset: float = 0) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what stands in the column's block."""
    reach = SHAPE_PIXELS / 2 - inset
    x, y = (column + 0.5) * BLOCK_PIXELS, 0.5 * BLOCK_PIXELS
    return x - reach, y - reach, x + reach, y + reach


def _triangle(column: int, inset: float) -> list[tuple[float, float]]:
    """Its corners; an inset one is nearer to the centre of the incircle by that at each side."""
    left, top, right, bottom = shape_box(column)
    x, y, near = (left + right) / 2, bottom - _INCIRCLE_PIXELS, 1 - inset / _INCIRCLE_PIXELS
    corners = [(left, bottom), (right, bottom), (x, top)]
    return [(x + near * (a - x), y + near * (b - y)) for a, b in corners]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
