"""What a modality is: media to tokens with positions, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from nextdit_core import registry
from nextdit_core.errors import UserError, accepted

__all__ = ["Modality", "Size", "load_modality"]

#: The extent of one sample in the modality's own units: (height, width), (points,), ...
Size = tuple[int, ...]


@runtime_checkable
class Modality(Protocol):
    """One kind of media, seen by the backbone as tokens with positions.

    A class that satisfies this protocol becomes usable everywhere once its distribution
    declares it in the entry-point group `nextdit.modalities`. It is built as
    `Class(**options)` with options from a recipe. `nextdit_core.testing.check_modality`
    checks an implementation.

    Inheriting from this class brings all that media need that are their own latent, on the CPU:
    `encode`, `decode` and `decode_tensor` that return what they are given, `to` that does
    nothing, a `latent_channels`, and a `read` that refuses.

    Attributes:
        axes: Position axes in use: 1, 2 or 3 (see `NextDiTConfig.axes`).
        token_dim: Numbers in one token.
        default_size: The size that is sampled where none is asked for.
        suffix: File name ending of what `write` makes, such as ".png".
        options: JSON-able keyword arguments that build an equal object.
    """

    axes: int
    token_dim: int
    default_size: Size
    suffix: str
    options: Mapping[str, Any]

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, which change fastest in a token: number i is of i % channels."""
        return self.token_dim

    def to(self, device: torch.device) -> Self:
        """Encode and decode on this device from now on; what was left on disk for it is read."""
        return self

    def encode(self, media: Any) -> Tensor:
        """Turn one medium into its latent, a float tensor of roughly unit scale."""
        return media

    def decode(self, latent: Tensor) -> Any:
        """Turn one latent back into a medium; the inverse of `encode`."""
        return latent

    def decode_tensor(self, latent: Tensor) -> Tensor:
        """Turn one latent into the numbers of its medium, such as pixels in [-1, 1], unrounded."""
        return latent

    def read(self, path: Path, size: Size | None = None) -> Any:
        """Read one medium from a file, fitted to a size, or to the nearest that can be made.

        Raises:
            UserError: The file cannot be read, or this modality reads none.
        """
        raise UserError(f"cannot read {path}: {type(self).__name__} reads no files")

    def size(self, latent: Tensor) -> Size:
        """Read the size of a latent."""
        ...

    def positions(self, size: Size) -> Tensor:
        """Give the `[tokens, 3]` float positions (time or view, row, column) of a size.

        Raises:
            UserError: The modality cannot make this size.
        """
        ...

    def tokenize(self, latent: Tensor) -> Tensor:
        """Cut a latent into `[tokens, token_dim]`, in the order of `positions`."""
        ...

    def detokenize(self, values: Tensor, size: Size) -> Tensor:
        """Put `[tokens, token_dim]` together to a latent; the inverse of `tokenize`."""
        ...

    def write(self, media: Sequence[Any], path: Path, captions: Sequence[str]) -> None:
        """Write the media into one file, in which each can be told from the others."""
        ...


REQUIRED = (
    "axes",
    "token_dim",
    "default_size",
    "suffix",
    "options",
    "latent_channels",
    "to",
    "encode",
    "decode",
    "decode_tensor",
    "read",
    "size",
    "positions",
    "tokenize",
    "detokenize",
    "write",
)


def load_modality(name: str, options: Mapping[str, Any] | None = None) -> Modality:
    """Build the modality of that name.

    Args:
        name: Entry-point name, such as "image".
        options: Keyword arguments of its class.

    Returns:
        The modality.

    Raises:
        UserError: The name is not installed, an option is wrong, or the class lacks part of
            the protocol.
    """
    cls = registry.load("nextdit.modalities", name)
    modality = build(f"modality {name!r}", cls, options or {})
    lacking = [attribute for attribute in REQUIRED if not hasattr(modality, attribute)]
    if lacking:
        raise UserError(
            f"modality {name!r} lacks {', '.join(lacking)}; "
            f"{cls.__module__}.{cls.__qualname__} must satisfy nextdit_core.Modality"
        )
    return modality


def build(what: str, cls: Any, options: Mapping[str, Any]) -> Any:
    """Call a class with options, naming the accepted ones where one is unknown.

    Args:
        what: How an error calls it, such as "dataset 'digits'".
        cls: The class or factory.
        options: Its keyword arguments.

    Returns:
        What the call returned.

    Raises:
        UserError: An option is unknown or refused.
    """
    import inspect

    parameters = inspect.signature(cls).parameters
    for key in options:
        if key not in parameters:
            choices = ", ".join(accepted(key, parameters)) or "none"
            raise UserError(f"{what} has no option {key!r}; accepted: {choices}")
    try:
        return cls(**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error
