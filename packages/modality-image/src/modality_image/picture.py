"""Pictures from files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from nextdit_core import UserError

__all__ = ["fitted", "read_picture"]


def read_picture(file: Path) -> Pillow.Image:
    """Read a picture as RGB, turned as its camera says.

    Raises:
        UserError: The file is not a picture that Pillow can read.
    """
    try:
        with Pillow.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read picture {file}: {error}; repair or remove it") from error


def fitted(picture: Pillow.Image, height: int, width: int) -> Pillow.Image:
    """Scale a picture and cut it around its centre to a size in pixels."""
    return ImageOps.fit(picture, (width, height), method=Pillow.Resampling.LANCZOS)
