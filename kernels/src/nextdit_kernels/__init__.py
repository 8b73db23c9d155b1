"""Triton kernels for Next-DiT, as PyTorch operators.

Importing this package imports neither torch nor Triton; the first use of a name does.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextdit_kernels.backend import TRITON
    from nextdit_kernels.glu import swiglu
    from nextdit_kernels.qk_norm import norm_rotate
    from nextdit_kernels.rotary import rotate

__version__ = version("nextdit-kernels")

__all__ = ["TRITON", "__version__", "norm_rotate", "rotate", "swiglu"]

_MODULES = {
    "TRITON": "nextdit_kernels.backend",
    "norm_rotate": "nextdit_kernels.qk_norm",
    "rotate": "nextdit_kernels.rotary",
    "swiglu": "nextdit_kernels.glu",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
