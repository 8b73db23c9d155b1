"""Many small pictures with captions on one sheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

__all__ = ["contact_sheet"]

PICTURE, GAP, FONT_SIZE = 96, 12, 12


def contact_sheet(
    pictures: Sequence[Pillow.Image], captions: Sequence[str], columns: int | None = None
) -> Pillow.Image:
    """Draw pictures in rows, each with its caption below.

    Small pictures are enlarged by a whole factor, so that every pixel stays a square.

    Args:
        pictures: At least one.
        captions: One each.
        columns: Pictures in a row; about as many as rows when None.

    Returns:
        An RGB picture.
    """
    columns = columns or min(len(pictures), math.ceil(math.sqrt(len(pictures))))
    enlarged = [_enlarge(picture) for picture in pictures]
    width = max(picture.width for picture in enlarged) + GAP
    height = max(picture.height for picture in enlarged)
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = ["\n".join(textwrap.wrap(text, max(8, width // 7))) for text in captions]
    lines = max(text.count("\n") + 1 for text in wrapped)
    row_height = height + lines * (FONT_SIZE + 4) + GAP
    rows = math.ceil(len(pictures) / columns)
    sheet = Pillow.new("RGB", (columns * width + GAP, rows * row_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(enlarged, wrapped, strict=True)):
        left = GAP // 2 + index % columns * width
        top = GAP // 2 + index // columns * row_height
        sheet.paste(picture.convert("RGB"), (left + (width - picture.width) // 2, top))
        place = (left + width // 2, top + height + 2)
        pen.multiline_text(place, text, fill="black", font=font, anchor="ma", align="center")
    return sheet


def _enlarge(picture: Pillow.Image) -> Pillow.Image:
    factor = max(1, PICTURE // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Pillow.Resampling.NEAREST)
