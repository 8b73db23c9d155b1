"""Images for Next-DiT."""

from __future__ import annotations

from importlib.metadata import version

from modality_image.digits import Digits, recognise
from modality_image.image import Image
from modality_image.image_folder import ImageFolder

__all__ = ["Digits", "Image", "ImageFolder", "__version__", "recognise"]

__version__ = version("modality-image")
