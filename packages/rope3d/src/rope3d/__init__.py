"""Rotary position embedding over any number of axes, and attention with it."""

from importlib.metadata import version

from rope3d.attention_backends import AttentionBackend, GatedAttentionBackend
from rope3d.attention_case import AttentionCase
from rope3d.backends import Backend, WritingBackend
from rope3d.explanation import explain
from rope3d.extrapolation import yarn_scale
from rope3d.gated_text import GatedText
from rope3d.layouts import axial, lumina, mrope, paper
from rope3d.learned_rope import LearnedRope
from rope3d.model_layouts import cogvideox, flux, hunyuan_video, lumina2, wan
from rope3d.positions import grid, pack, points
from rope3d.rope import Rope
from rope3d.rotation import Rotation, apply, rotate
from rope3d.softmax_attention import attention
from rope3d.timed_rope import TimedRope
from rope3d.wavelength_plot import plot_wavelengths, wavelengths

__version__ = version("rope3d")

__all__ = [
    "AttentionBackend",
    "AttentionCase",
    "Backend",
    "GatedAttentionBackend",
    "GatedText",
    "LearnedRope",
    "Rope",
    "Rotation",
    "TimedRope",
    "WritingBackend",
    "__version__",
    "apply",
    "attention",
    "axial",
    "cogvideox",
    "explain",
    "flux",
    "grid",
    "hunyuan_video",
    "lumina",
    "lumina2",
    "mrope",
    "pack",
    "paper",
    "plot_wavelengths",
    "points",
    "rotate",
    "wan",
    "wavelengths",
    "yarn_scale",
]
