"""What an autoencoder is: media to latents of about unit scale, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from nextdit_core import registry
from nextdit_core.errors import UserError
from nextdit_core.modality import build

__all__ = ["Autoencoder", "LatentSpec", "load_autoencoder"]

#: What `load_autoencoder` looks for.
REQUIRED = ("latent", "media_channels", "options", "encode", "decode", "to")


@dataclass(frozen=True)
class LatentSpec:
    """What a latent is beside the medium: how much smaller, and on which scale.

    latent = (z - shift) · scale, channel by channel, where z is what the network encodes to.

    Args:
        channels: Channels of a latent, its first dimension.
        strides: Along each further dimension, samples of the medium that one cell stands for:
            (8, 8) for most image autoencoders.
        scale: One number for all channels, or one each; finite and not 0.
        shift: Likewise; finite.

    Raises:
        UserError: A number is out of range.

    Convention: The scale multiplies on the way in, as `scaling_factor` of diffusers does.

    >>> spec = LatentSpec(channels=4, strides=(8, 8), scale=(0.5,))
    >>> spec.denormalise(spec.normalise(torch.full((4, 1, 1), 3.0)))[0].item()
    3.0
    """

    channels: int
    strides: tuple[int, ...]
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.channels < 1 or not self.strides or min(self.strides) < 1:
            raise UserError(
                f"a latent has channels {self.channels} and strides {self.strides}; expected "
                f"whole numbers of at least 1"
            )
        for name, numbers in (("scale", self.scale), ("shift", self.shift)):
            fits = len(numbers) in (1, self.channels) and all(map(math.isfinite, numbers))
            if not fits or (name == "scale" and 0.0 in numbers):
                raise UserError(
                    f"the {name} of a latent is {numbers}; expected one finite number, or "
                    f"{self.channels}, one a channel" + ", none of them 0" * (name == "scale")
                )

    def normalise(self, z: Tensor) -> Tensor:
        """Bring what the network encodes to, `[channels, ...]`, to about unit scale."""
        return (z - self._each(self.shift, z)) * self._each(self.scale, z)

    def denormalise(self, latent: Tensor) -> Tensor:
        """Give back what the network decodes from; the inverse of `normalise`."""
        return latent / self._each(self.scale, latent) + self._each(self.shift, latent)

    def _each(self, numbers: tuple[float, ...], like: Tensor) -> float | Tensor:
        if len(numbers) == 1:
            return numbers[0]
        shape = (-1, *[1] * (like.ndim - 1))
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(shape)


@runtime_checkable
class Autoencoder(Protocol):
    """A frozen network that a modality encodes its media with.

    A class that satisfies this protocol becomes usable by name once its distribution declares it
    in the entry-point group `nextdit.autoencoders`. It is built as `Class(**options)`; weights may
    be read later, at the latest by `to`. `nextdit_core.testing.check_autoencoder` checks one.

    Attributes:
        latent: Shape and scale of what `encode` gives.
        media_channels: Channels of what it takes: 3 for colour pictures.
        options: JSON-able keyword arguments that build an equal object.
    """

    latent: LatentSpec
    media_channels: int
    options: Mapping[str, Any]

    def encode(self, media: Tensor) -> Tensor:
        """Encode one medium.

        Args:
            media: `[media_channels, ...]` float in [-1, 1], each further dimension a multiple of
                its stride; on any device.

        Returns:
            `[channels, ...]` float32, the same for the same medium, of about unit scale.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Decode one latent, `[channels, ...]`, to `[media_channels, ...]` float32."""
        ...

    def to(self, device: torch.device) -> Self:
        """Compute on this device from now on; weights that were left on disk are read."""
        ...


def load_autoencoder(name: str, options: Mapping[str, Any] | None = None) -> Autoencoder:
    """Build the autoencoder of that name.

    Args:
        name: Entry-point name, such as "kl-image".
        options: Keyword arguments of its class.

    Returns:
        The autoencoder.

    Raises:
        UserError: The name is not installed, an option is wrong, or the class lacks part of the
            protocol.
    """
    cls = registry.load("nextdit.autoencoders", name)
    found = build(f"autoencoder {name!r}", cls, options or {})
    lacking = [attribute for attribute in REQUIRED if not hasattr(found, attribute)]
    if lacking:
        raise UserError(
            f"autoencoder {name!r} lacks {', '.join(lacking)}; {cls.__module__}."
            f"{cls.__qualname__} must satisfy nextdit_core.Autoencoder"
        )
    return found
