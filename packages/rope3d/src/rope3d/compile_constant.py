"""Mark what torch.compile may take as a constant: results of functions, and sizes of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

__all__ = ["compile_constant", "static_sizes"]

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


def static_sizes(tensor: Tensor) -> Tensor:
    """Do what `torch._dynamo.mark_static` does, without importing the compiler.

    Otherwise `dynamic=True` takes the sizes of a table for variables, and recompiles when the
    tokens are as many as its rows by chance.

    Args:
        tensor: Its sizes never change.

    Returns:
        The same tensor.

    >>> import torch
    >>> static_sizes(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    marks = {"_dynamo_static_indices": set(range(tensor.ndim)), "_has_dynamo_dim_marking": True}
    vars(tensor).update(marks)
    return tensor
