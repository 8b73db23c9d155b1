"""A folder of pictures, each with a caption in a text file of the same name."""

from __future__ import annotations

from pathlib import Path

from modality_image.picture import fitted, read_picture
from nextdit_core import Example, UserError

__all__ = ["ImageFolder"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class ImageFolder:
    """Captioned pictures of a folder and its sub-folders, in order of their paths.

    The caption of `a/fox.jpg` is the text of `a/fox.txt`, or empty where there is none. Each
    picture is scaled and cut around its centre to the given size.

    Args:
        path: The folder.
        height: Height of every picture, in pixels.
        width: Width of every picture, in pixels.

    Raises:
        UserError: The folder is missing or holds no pictures, or a side is below 1.
    """

    def __init__(self, path: str, height: int = 32, width: int = 32) -> None:
        if height < 1 or width < 1:
            raise UserError(f"folder size is {height}x{width}; expected sides of at least 1")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; set dataset_options.path to one")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        self.files = files
        self.width, self.height = width, height

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """Read one picture and its caption.

        Raises:
            UserError: The file is not a picture that Pillow can read.
        """
        file = self.files[index]
        picture = fitted(read_picture(file), self.height, self.width)
        text = file.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        return Example(picture, caption)
