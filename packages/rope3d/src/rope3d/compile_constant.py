"""Mark functions whose result torch.compile may take as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["compile_constant"]

_Function = TypeVar("_Function", bound=Callable[..., object])


def compile_constant(function: _Function) -> _Function:
    """Do what `torch.compiler.assume_constant_result` does, without importing the compiler.

    That decorator imports `torch._dynamo`, which triples the time of `import rope3d`; the mark
    that it leaves is this attribute.

    Args:
        function: Called once while tracing, with arguments that are Python constants.

    Returns:
        The same function.

    >>> compile_constant(lambda: 3)()
    3
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
