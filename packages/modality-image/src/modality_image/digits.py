"""Handwritten digits with captions, and a reader that tells which digit a picture shows.

Source: the test set of the UCI "Optical Recognition of Handwritten Digits" data, 1,797
pictures of 8 by 8 pixels, which scikit-learn ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image as Pillow

from nextdit_core import Example, UserError

__all__ = ["WORDS", "Digits", "Recognition", "caption", "recognise"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Every fifth picture is held out.
HELD_OUT = 5


def caption(digit: int) -> str:
    """Describe a digit as the dataset does.

    >>> caption(7)
    'a handwritten seven'
    """
    return f"a handwritten {WORDS[digit]}"


class Digits:
    """Captioned handwritten digits.

    Args:
        split: "train", "test" (every fifth picture) or "all".
        size: Side in pixels; the 8 by 8 originals are enlarged bicubically.

    Raises:
        UserError: scikit-learn is missing, or an argument is not acceptable.
    """

    def __init__(self, split: Literal["train", "test", "all"] = "train", size: int = 16) -> None:
        if split not in ("train", "test", "all"):
            raise UserError(f"digits split is {split!r}; accepted: train, test, all")
        if size < 8:
            raise UserError(f"digits size is {size}; expected at least 8")
        data = _bunch()
        held_out = np.arange(len(data.target)) % HELD_OUT == HELD_OUT - 1
        keep = {"train": ~held_out, "test": held_out, "all": held_out | ~held_out}[split]
        self.labels: list[int] = data.target[keep].tolist()
        self.pictures = [_picture(pixels, size) for pixels in data.images[keep]]

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Give one picture and its caption."""
        return Example(self.pictures[index], caption(self.labels[index]))


@dataclass(frozen=True)
class Recognition:
    """What a reader of real digits makes of some pictures.

    Args:
        digits: The digit that it reads in each picture.
        held_out_accuracy: Share of real pictures, unseen by it, that it reads correctly.
    """

    digits: list[int]
    held_out_accuracy: float

    def accuracy(self, asked: Sequence[int]) -> float:
        """Give the share of pictures that are read as the digit that was asked for."""
        return float(np.mean(np.asarray(self.digits) == np.asarray(asked)))


def recognise(pictures: Sequence[Pillow.Image]) -> Recognition:
    """Read digits with a support vector machine trained on the real ones.

    Args:
        pictures: Square grey pictures of one size, at least 8 pixels wide.

    Returns:
        The digits read, and how well the reader does on real pictures that it has not seen.

    Raises:
        UserError: scikit-learn is missing, or there is no picture.
    """
    if not pictures:
        raise UserError("no picture to recognise; give at least one")
    size = pictures[0].width
    train, test = Digits("train", size), Digits("test", size)
    from sklearn.svm import SVC

    reader = SVC().fit(_features(train.pictures), train.labels)
    held_out = reader.score(_features(test.pictures), test.labels)
    return Recognition(reader.predict(_features(pictures)).tolist(), float(held_out))


def _features(pictures: Sequence[Pillow.Image]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.stack([np.asarray(picture.convert("L")).ravel() / 255.0 for picture in pictures])


def _picture(pixels: np.ndarray[Any, Any], size: int) -> Pillow.Image:
    picture = Pillow.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    return picture.resize((size, size), Pillow.Resampling.BICUBIC)


def _bunch() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed; install it with: "
            "pip install modality-image[digits]"
        ) from error
    return load_digits()
