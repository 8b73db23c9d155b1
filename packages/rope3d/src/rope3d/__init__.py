"""Rotary position embedding over any number of axes, and attention with it."""

from importlib.metadata import version

from rope3d.backends import Backend, explain
from rope3d.layouts import Rope, axial, lumina, paper
from rope3d.positions import grid, pack
from rope3d.rotation import Rotation, apply, rotate
from rope3d.softmax_attention import attention

__version__ = version("rope3d")

__all__ = [
    "Backend",
    "Rope",
    "Rotation",
    "__version__",
    "apply",
    "attention",
    "axial",
    "explain",
    "grid",
    "lumina",
    "pack",
    "paper",
    "rotate",
]
