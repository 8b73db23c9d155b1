"""The image modality: pixels cut into square patches, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

import rope3d
from modality_image.sheet import contact_sheet
from nextdit_core import Modality, Size, UserError

__all__ = ["Image"]

MODES = {1: "L", 3: "RGB"}


class Image(Modality):
    """Images in pixel space.

    The latent is `[channels, height, width]` in [-1, 1]; a token is one patch, its numbers in
    (patch row, patch column, channel) order; its position is (0, row, column) of the patch.

    Args:
        channels: 1 (grey) or 3 (RGB).
        patch_size: Side of a patch, in pixels.
        height: Height that is sampled where none is asked for, in pixels.
        width: Width likewise.

    Raises:
        UserError: `channels` is another number, or a side is not a multiple of the patch.

    >>> image = Image(channels=3, patch_size=2, height=8, width=4)
    >>> image.tokenize(torch.zeros(3, 8, 4)).shape, image.positions((8, 4))[-1].tolist()
    (torch.Size([8, 12]), [0.0, 3.0, 1.0])
    """

    axes = 2
    suffix = ".png"

    def __init__(
        self, channels: int = 3, patch_size: int = 2, height: int = 32, width: int = 32
    ) -> None:
        if channels not in MODES:
            raise UserError(f"image channels is {channels}; expected 1 (grey) or 3 (RGB)")
        if patch_size < 1:
            raise UserError(f"image patch_size is {patch_size}; expected at least 1")
        self.channels = channels
        self.patch_size = patch_size
        self.token_dim = channels * patch_size**2
        self.default_size = (height, width)
        self.options = {
            "channels": channels,
            "patch_size": patch_size,
            "height": height,
            "width": width,
        }
        self._patches(self.default_size)

    def encode(self, media: Any) -> Tensor:
        """Scale the pixels of a PIL image to [-1, 1], in this modality's colours."""
        if not isinstance(media, Pillow.Image):
            raise UserError(f"an image is a PIL.Image.Image; got {type(media).__name__}")
        pixels = np.asarray(media.convert(MODES[self.channels]), dtype=np.float32)
        if self.channels == 1:
            pixels = pixels[..., None]
        return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()

    def decode(self, latent: Tensor) -> Pillow.Image:
        """Round `[channels, height, width]` in [-1, 1] to the pixels of a PIL image."""
        pixels = ((latent.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).cpu().numpy()
        return Pillow.fromarray(array[..., 0] if self.channels == 1 else array)

    def size(self, latent: Tensor) -> Size:
        """Read (height, width) in pixels."""
        return latent.shape[-2], latent.shape[-1]

    def positions(self, size: Size) -> Tensor:
        """Give `[tokens, 3]` positions: (0, row, column) of every patch, row by row."""
        rows, columns = self._patches(size)
        return rope3d.grid(frames=1, height=rows, width=columns)

    def tokenize(self, latent: Tensor) -> Tensor:
        """Cut `[channels, height, width]` into `[tokens, token_dim]` patches."""
        rows, columns = self._patches(self.size(latent))
        side = self.patch_size
        patches = latent.reshape(self.channels, rows, side, columns, side)
        return patches.permute(1, 3, 2, 4, 0).reshape(rows * columns, self.token_dim)

    def detokenize(self, values: Tensor, size: Size) -> Tensor:
        """Put `[tokens, token_dim]` patches together to `[channels, height, width]`."""
        rows, columns = self._patches(size)
        side = self.patch_size
        patches = values.reshape(rows, columns, side, side, self.channels)
        return patches.permute(4, 0, 2, 1, 3).reshape(self.channels, rows * side, columns * side)

    def write(self, media: Sequence[Any], path: Path, captions: Sequence[str]) -> None:
        """Write one image as it is, and several as a contact sheet with captions."""
        picture = media[0] if len(media) == 1 else contact_sheet(media, captions)
        picture.save(path, format="PNG")

    def _patches(self, size: Size) -> tuple[int, int]:
        side = self.patch_size
        if len(size) != 2 or any(extent < 1 or extent % side for extent in size):
            raise UserError(
                f"image size {'x'.join(map(str, size))} does not work; expected HEIGHTxWIDTH, "
                f"both multiples of {side} (the patch size)"
            )
        return size[0] // side, size[1] // side
