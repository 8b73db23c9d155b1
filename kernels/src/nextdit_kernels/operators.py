"""Operators: define a kernel's launch for PyTorch, and call it with little overhead.

The operator is what torch.compile, torch.export and modes see. Eagerly its dispatcher costs more
host time than a short kernel takes on the device, so there the launch runs directly, inside one
autograd function where a gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["define"]

_NAMESPACE = "nextdit_kernels"

# Types of arguments that are no subclass of Tensor.
_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str, list, tuple))


def define(
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator, and give the function to call.

    Args:
        schema: Name and arguments, as in `twice(Tensor x) -> Tensor`; optional arguments may not
            be left out when calling.
        launch: Runs the kernel; on CUDA, and on the CPU in Triton's interpreter.
        fake: Checks as the launch does, and gives the outputs without numbers.
        setup_context: `(ctx, inputs, output)`: saves what `backward` needs.
        backward: `(ctx, *grads)`: gives one gradient or None for each argument. None makes a
            derivative an error; such is the operator of a backward pass.

    Returns:
        A function of the operator's arguments in their order, without keywords.
    """
    name = schema[: schema.index("(")]
    qualified = f"{_NAMESPACE}::{name}"
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    # Any strides do, so the compiler need not copy into the layout that eager would have.
    torch.library.define(qualified, schema.removeprefix(name), tags=tags)
    torch.library.impl(qualified, ("cpu", "cuda"), launch)
    torch.library.register_fake(qualified, fake)
    operator = getattr(getattr(torch.ops, _NAMESPACE), name).default
    if backward is None or setup_context is None:
        setup_context, backward = _save_nothing, _refusal(name)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    # Not with its own `setup_context`: PyTorch then binds the signature of forward at every call.
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = launch(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    differentiable: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _watched():
            return operator(*arguments)
        # Part of every call, so that the common case is one look at all types.
        if not _PLAIN.issuperset(map(type, arguments)) and any(
            isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments
        ):  # a subclass of Tensor, which wants to see the operator
            return operator(*arguments)
        if torch.is_grad_enabled():
            for x in arguments:
                if isinstance(x, Tensor) and x.requires_grad:
                    return differentiable.apply(*arguments)
        return launch(*arguments)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Call the operator {qualified}."
    return call


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refusal(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        # Left to itself, autograd would silently leave the gradient out.
        raise RuntimeError(
            f"{name} has no derivative, so this operation can be differentiated once; use its "
            "PyTorch form for higher derivatives"
        )

    return backward


def _watched() -> bool:
    """Tell whether a mode or a transform must see the operator."""
    return bool(
        torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    )
