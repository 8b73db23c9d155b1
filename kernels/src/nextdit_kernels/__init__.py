"""Triton kernels for Next-DiT, as PyTorch operators.

Importing this package imports neither torch nor Triton; the first use of a name does.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextdit_kernels.attention_backend import ATTENTION
    from nextdit_kernels.backend import TRITON
    from nextdit_kernels.block import BLOCK
    from nextdit_kernels.glu import swiglu
    from nextdit_kernels.qk_norm import norm_rotate
    from nextdit_kernels.rotary import rotate, rotate_
    from nextdit_kernels.sandwich import gate_residual, norm_modulate
    from nextdit_kernels.softmax_attention import attention, gated_cross_attention

__version__ = version("nextdit-kernels")

__all__ = [
    "ATTENTION",
    "BLOCK",
    "TRITON",
    "__version__",
    "attention",
    "gate_residual",
    "gated_cross_attention",
    "norm_modulate",
    "norm_rotate",
    "rotate",
    "rotate_",
    "swiglu",
]

_MODULES = {
    "ATTENTION": "nextdit_kernels.attention_backend",
    "BLOCK": "nextdit_kernels.block",
    "TRITON": "nextdit_kernels.backend",
    "attention": "nextdit_kernels.softmax_attention",
    "gate_residual": "nextdit_kernels.sandwich",
    "gated_cross_attention": "nextdit_kernels.softmax_attention",
    "norm_modulate": "nextdit_kernels.sandwich",
    "norm_rotate": "nextdit_kernels.qk_norm",
    "rotate": "nextdit_kernels.rotary",
    "rotate_": "nextdit_kernels.rotary",
    "swiglu": "nextdit_kernels.glu",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
