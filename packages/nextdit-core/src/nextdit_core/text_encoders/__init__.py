"""Turn prompts into text features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from nextdit_core import registry
from nextdit_core.conditioning import Conditioning
from nextdit_core.errors import UserError
from nextdit_core.modality import build

__all__ = ["FrozenTextEncoder", "TextEncoder", "load_text_encoder"]


@runtime_checkable
class TextEncoder(Protocol):
    """A module that encodes prompts.

    Its parameters are trained, averaged and saved together with the backbone's. One without
    parameters, such as a frozen language model that it keeps to itself, is saved by name and
    options only.

    Attributes:
        text_dim: Width of the features.
        options: JSON-able keyword arguments that build an equal, untrained object.
    """

    text_dim: int
    options: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; an empty prompt has at least one real token."""
        ...


@runtime_checkable
class FrozenTextEncoder(TextEncoder, Protocol):
    """A text encoder that training does not change, so that its features can be kept on disk."""

    @property
    def device(self) -> torch.device:
        """Where features are computed and returned; follows `Module.to`."""
        ...

    def identity(self) -> str:
        """Give a hexadecimal digest of all that features depend on besides the prompt."""
        ...

    def release(self) -> None:
        """Free the weights; the next call loads them again."""
        ...


def load_text_encoder(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the text encoder of that name.

    Args:
        name: Entry-point name: "bytes", untrained, or "transformers", pretrained.
        options: Keyword arguments of its class.

    Returns:
        A module that satisfies `TextEncoder`.

    Raises:
        UserError: The name is not installed, an option is wrong, or it is not a module.
    """
    cls = registry.load("nextdit.text_encoders", name)
    encoder = build(f"text encoder {name!r}", cls, options or {})
    if not isinstance(encoder, nn.Module):
        raise UserError(f"text encoder {name!r} is not a torch.nn.Module; {cls!r} must be one")
    return encoder
