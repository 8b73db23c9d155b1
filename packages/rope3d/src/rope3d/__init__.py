"""Rotary position embedding over any number of axes, and attention with it."""

from importlib.metadata import version

from rope3d.backends import Backend, explain
from rope3d.extrapolation import yarn_scale
from rope3d.layouts import axial, lumina, paper
from rope3d.positions import grid, pack
from rope3d.rope import Rope
from rope3d.rotation import Rotation, apply, rotate
from rope3d.softmax_attention import attention
from rope3d.timed_rope import TimedRope

__version__ = version("rope3d")

__all__ = [
    "Backend",
    "Rope",
    "Rotation",
    "TimedRope",
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
    "yarn_scale",
]
