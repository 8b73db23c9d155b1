"""Images for Next-DiT."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modality_image.digits import Digits, Recognition, recognise
    from modality_image.image import Image
    from modality_image.image_folder import ImageFolder
    from modality_image.kl_autoencoder import KLAutoencoder
    from modality_image.sheet import contact_sheet

__version__ = version("modality-image")

_HOMES = {
    "Digits": "digits",
    "Image": "image",
    "ImageFolder": "image_folder",
    "KLAutoencoder": "kl_autoencoder",
    "Recognition": "digits",
    "contact_sheet": "sheet",
    "recognise": "digits",
}

__all__ = [
    "Digits",
    "Image",
    "ImageFolder",
    "KLAutoencoder",
    "Recognition",
    "__version__",
    "contact_sheet",
    "recognise",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `nextdit --help` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'modality_image' has no attribute {name!r}")
    return getattr(import_module(f"modality_image.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
