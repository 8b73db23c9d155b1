"""What every kernel of the package asks of its tensors, and the loads that their layout allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

__all__ = [
    "DTYPES",
    "aligned",
    "blocks",
    "in_order",
    "launch",
    "power_of_2",
    "remembered",
    "why_not",
]

Plan = TypeVar("Plan", bound=Callable[..., Any])

#: The dtypes that the kernels take.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Bytes of the widest load; plans that are remembered for each operator.
_LOAD, _PLANS = 16, 1024


def why_not(kernel: object, **tensors: Tensor) -> str | None:
    """Say why the kernel cannot serve tensors of such dtypes on such devices, or None if it can.

    Args:
        kernel: What `triton.jit` made. In Triton's interpreter, chosen by TRITON_INTERPRET when the
            kernel was defined, it also takes tensors on the CPU.
        **tensors: By the name that the reason should use.

    Returns:
        A reason that names what is served, or None.
    """
    (first, x), *others = tensors.items()
    if x.dtype not in DTYPES or any(other.dtype != x.dtype for _, other in others):
        found = [f"{first} is {x.dtype}", *(f"{name} {other.dtype}" for name, other in others)]
        return f"{_listed(found)}; the kernel takes one of bfloat16, float16, float32"
    if any(other.device != x.device for _, other in others):
        found = [f"{first} is on {x.device}", *(f"{name} on {y.device}" for name, y in others)]
        return f"{_listed(found)}; the kernel needs one device"
    if x.device.type == "cuda":
        if not torch.cuda.is_available():
            return f"{first} is on cuda, but this machine has no CUDA device"
        if torch.cuda.get_device_properties(x.device).major < 8:
            return "the GPU is older than Triton serves; it needs compute capability 8.0"
    elif isinstance(kernel, JITFunction) or x.device.type != "cpu":
        return (
            f"{first} is on {x.device.type}; the kernel needs CUDA, or TRITON_INTERPRET=1 set "
            "before nextdit_kernels is imported, which runs it on the CPU, slowly"
        )
    return None


def remembered(plan: Plan) -> Plan:
    """Plan a launch once for tensors of the same layout.

    Checks, grid, strides and constants follow from shapes, strides, dtypes and devices. Working
    them out can take the host longer than the kernel runs; looking them up takes it 2 to 4
    microseconds.

    Args:
        plan: A function of tensors and of what can be hashed. Its result holds no tensors, and
            nobody changes it. An error is not remembered.

    Returns:
        The same function, for arguments by position; its `cache_clear()` forgets all plans.
    """
    known: dict[Any, Any] = {}

    @wraps(plan)
    def look_up(*arguments: Any) -> Any:
        # What of an argument a plan depends on, without a call for each: this is part of every call
        # of an operator.
        key = tuple(
            [
                (x.shape, x.stride(), x.dtype, x.device)
                if isinstance(x, Tensor)
                else (tuple(x) if type(x) is list else x)
                for x in arguments
            ]
        )
        found = known.get(key)
        if found is None:
            if len(known) >= _PLANS:
                known.clear()
            found = known[key] = plan(*arguments)
        return found

    look_up.__dict__["cache_clear"] = known.clear
    return cast("Plan", look_up)


def in_order(
    kernel: Any, constants: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, int | None]]:
    """Split the constants of a kernel from the compiler's options.

    Args:
        kernel: What `triton.jit` made; its constants are its last arguments.
        constants: By name, with options such as num_warps among them.

    Returns:
        The constants as the kernel takes them by position, which costs the host less than by name,
        and the options.
    """
    names = kernel.arg_names
    options = {name: value for name, value in constants.items() if name not in names}
    last = names[len(names) - len(constants) + len(options) :]
    return tuple([constants[name] for name in last]), options


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor."""
    x = arguments[0]
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def blocks(count: int, size: int) -> int:
    """Count the blocks of a size that hold a number of elements.

    Like `power_of_2` in place of Triton's own, which take about 2 microseconds of the host a call:
    they are made to run inside kernels too.

    >>> blocks(9, 4)
    3
    """
    return -(-count // size)


def power_of_2(count: int) -> int:
    """Give the least power of two that is not below a number.

    >>> power_of_2(72)
    128
    """
    return 1 << (count - 1).bit_length() if count > 0 else 1


def _listed(words: list[str]) -> str:
    """Write "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def aligned(width: int, itemsize: int, *strides: tuple[int, ...]) -> int:
    """Count the neighbouring elements, a power of two, that one load may take.

    Args:
        width: Elements of a row.
        itemsize: Bytes of an element.
        *strides: Of each tensor, that of the elements of a row last.

    Returns:
        At most 16 bytes' worth; 1 where a row's elements are not neighbours.
    """
    together = math.gcd(_LOAD // itemsize, width)
    for stride in strides:
        if stride[-1] != 1:
            return 1
        together = math.gcd(together, *stride[:-1])
    return together
