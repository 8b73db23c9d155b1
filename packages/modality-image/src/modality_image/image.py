"""The image modality: pixels, or latents of an autoencoder, cut into square patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

import rope3d
from modality_image.picture import fitted, read_picture
from modality_image.sheet import contact_sheet
from nextdit_core import Autoencoder, Modality, Size, UserError
from nextdit_core.autoencoder import load_autoencoder

__all__ = ["Image"]

MODES = {1: "L", 3: "RGB"}


class Image(Modality):
    """Images in pixel space, or in the latent space of an autoencoder.

    The latent is `[channels, height, width]`: the pixels in [-1, 1] themselves, or what the
    autoencoder makes of them. A token is one patch of it, its numbers in (patch row, patch column,
    channel) order; its position is (0, row, column) of the patch. Sizes are in pixels either way.

    Args:
        channels: 1 (grey) or 3 (RGB).
        patch_size: Side of a patch, in cells of the latent.
        height: Height that is sampled where none is asked for, in pixels.
        width: Width likewise.
        autoencoder: Name of an installed autoencoder, such as "kl-image"; None is pixel space.
        autoencoder_options: Its options.

    Raises:
        UserError: `channels` is another number or not the autoencoder's, a side is not a multiple
            of the patch, or the autoencoder cannot be built.

    >>> image = Image(channels=3, patch_size=2, height=8, width=4)
    >>> image.tokenize(torch.zeros(3, 8, 4)).shape, image.positions((8, 4))[-1].tolist()
    (torch.Size([8, 12]), [0.0, 3.0, 1.0])
    """

    axes = 2
    suffix = ".png"

    def __init__(
        self,
        channels: int = 3,
        patch_size: int = 2,
        height: int = 32,
        width: int = 32,
        autoencoder: str | None = None,
        autoencoder_options: Mapping[str, Any] | None = None,
    ) -> None:
        if channels not in MODES:
            raise UserError(f"image channels is {channels}; expected 1 (grey) or 3 (RGB)")
        if patch_size < 1:
            raise UserError(f"image patch_size is {patch_size}; expected at least 1")
        self.channels = channels
        self.patch_size = patch_size
        self.default_size = (height, width)
        options: dict[str, Any] = {
            "channels": channels,
            "patch_size": patch_size,
            "height": height,
            "width": width,
        }
        self.autoencoder: Autoencoder | None = None
        self.stride = 1
        if autoencoder is not None:
            self.autoencoder = _autoencoder(autoencoder, autoencoder_options or {}, channels)
            self.stride = self.autoencoder.latent.strides[0]
            options["autoencoder"] = autoencoder
            options["autoencoder_options"] = dict(self.autoencoder.options)
        elif autoencoder_options:
            raise UserError("autoencoder_options are given and no autoencoder; name one")
        self.options = options
        self.token_dim = self.latent_channels * patch_size**2
        self._patches(self.default_size)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: colours, or the autoencoder's."""
        return self.channels if self.autoencoder is None else self.autoencoder.latent.channels

    def to(self, device: torch.device) -> Self:
        """Encode and decode on this device from now on."""
        if self.autoencoder is not None:
            self.autoencoder.to(device)
        return self

    def encode(self, media: Any) -> Tensor:
        """Turn a PIL image, in this modality's colours, into its latent."""
        if not isinstance(media, Pillow.Image):
            raise UserError(f"an image is a PIL.Image.Image; got {type(media).__name__}")
        array = np.asarray(media.convert(MODES[self.channels]), dtype=np.float32)
        if self.channels == 1:
            array = array[..., None]
        pixels = torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()
        return pixels if self.autoencoder is None else self.autoencoder.encode(pixels)

    def decode(self, latent: Tensor) -> Pillow.Image:
        """Round the pixels of a latent to those of a PIL image."""
        pixels = ((self.decode_tensor(latent) + 1.0) * 127.5).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).cpu().numpy()
        return Pillow.fromarray(array[..., 0] if self.channels == 1 else array)

    def decode_tensor(self, latent: Tensor) -> Tensor:
        """Give the pixels of a latent, `[1 or 3, height, width]` in [-1, 1]."""
        pixels = latent if self.autoencoder is None else self.autoencoder.decode(latent)
        return pixels.clamp(-1.0, 1.0)

    def read(self, path: Path, size: Size | None = None) -> Pillow.Image:
        """Read a picture, scaled and cut around its centre to a size.

        Args:
            path: A file that Pillow can read.
            size: (height, width) in pixels; the picture's own when None, less what is not a
                multiple of the patch.

        Raises:
            UserError: It is no picture, it is smaller than a patch, or the size cannot be made.
        """
        picture = read_picture(path)
        side = self.patch_size * self.stride
        if size is None:
            size = tuple(extent - extent % side for extent in (picture.height, picture.width))
        self._patches(size)
        return fitted(picture, *size)

    def size(self, latent: Tensor) -> Size:
        """Read (height, width) in pixels."""
        return latent.shape[-2] * self.stride, latent.shape[-1] * self.stride

    def positions(self, size: Size) -> Tensor:
        """Give `[tokens, 3]` positions: (0, row, column) of every patch, row by row."""
        rows, columns = self._patches(size)
        return rope3d.grid(frames=1, height=rows, width=columns)

    def tokenize(self, latent: Tensor) -> Tensor:
        """Cut `[channels, height, width]` into `[tokens, token_dim]` patches."""
        if len(latent) != self.latent_channels:
            raise UserError(
                f"a latent has shape {list(latent.shape)}; expected {self.latent_channels} channels"
            )
        rows, columns = self._patches(self.size(latent))
        side = self.patch_size
        patches = latent.reshape(self.latent_channels, rows, side, columns, side)
        return patches.permute(1, 3, 2, 4, 0).reshape(rows * columns, self.token_dim)

    def detokenize(self, values: Tensor, size: Size) -> Tensor:
        """Put `[tokens, token_dim]` patches together to `[channels, height, width]`."""
        rows, columns = self._patches(size)
        side, channels = self.patch_size, self.latent_channels
        patches = values.reshape(rows, columns, side, side, channels)
        return patches.permute(4, 0, 2, 1, 3).reshape(channels, rows * side, columns * side)

    def write(self, media: Sequence[Any], path: Path, captions: Sequence[str]) -> None:
        """Write one image as it is, and several as a contact sheet with captions."""
        picture = media[0] if len(media) == 1 else contact_sheet(media, captions)
        picture.save(path, format="PNG")

    def _patches(self, size: Size) -> tuple[int, int]:
        side = self.patch_size * self.stride
        if len(size) != 2 or any(extent < 1 or extent % side for extent in size):
            cells = f" of {self.stride} pixels a cell" * (self.stride > 1)
            raise UserError(
                f"image size {'x'.join(map(str, size))} does not work; expected HEIGHTxWIDTH, "
                f"both multiples of {side} (the patch size{cells})"
            )
        return size[0] // side, size[1] // side


def _autoencoder(name: str, options: Mapping[str, Any], channels: int) -> Autoencoder:
    """Build an autoencoder, and see whether it is one of pictures of these colours."""
    found = load_autoencoder(name, options)
    strides = found.latent.strides
    if len(strides) != 2 or strides[0] != strides[1]:
        raise UserError(
            f"autoencoder {name!r} has strides {strides}; expected two equal ones, for pictures"
        )
    if found.media_channels != channels:
        raise UserError(
            f"autoencoder {name!r} takes {found.media_channels} channels and image channels is "
            f"{channels}; expected the same"
        )
    return found
