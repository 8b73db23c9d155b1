"""Pictures from files, fitted to what can be made."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as Pillow

from modality_image import Image
from nextdit_core import UserError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture whose left half is red, and whose camera was held on its side."""
    picture = Pillow.new("RGB", (40, 22), "blue")
    picture.paste("red", (0, 0, 20, 22))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    return tmp_path / "photo.jpg"


def test_a_picture_is_turned_and_cut_to_whole_patches(photo: Path) -> None:
    found = Image(patch_size=4).read(photo)
    assert found.size == (20, 40)
    red, _, blue = found.getpixel((10, 4))
    assert red > 200
    assert blue < 60
    red, _, blue = found.getpixel((10, 36))
    assert red < 60
    assert blue > 200


def test_a_picture_is_fitted_to_a_size(photo: Path) -> None:
    assert Image(patch_size=4).read(photo, (16, 32)).size == (32, 16)
    with pytest.raises(UserError, match="both multiples of 4"):
        Image(patch_size=4).read(photo, (15, 32))
    with pytest.raises(UserError, match="image size 0x0 does not work"):
        Image(patch_size=64, height=64, width=64).read(photo)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(UserError, match=r"cannot read picture .*notes\.png"):
        Image().read(tmp_path / "notes.png")
