"""One layout in terms of another: each tensor from which others, by what function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nextdit_core.backbone import NextDiT
from nextdit_core.config import NextDiTConfig
from nextdit_core.errors import UserError

__all__ = ["Derived", "convert", "converted_shapes", "described", "own_tensors", "same"]


@dataclass(frozen=True)
class Derived:
    """How a tensor is made of tensors of another layout.

    Args:
        sources: Their names there.
        make: Takes them in this order. Works on the `meta` device too.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


def same(name: str) -> Derived:
    """Take a tensor as it is."""
    return Derived((name,), _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Undrawn(TorchFunctionMode):
    """Leaves out what draws weights: on `meta` it draws nothing, and imports for seconds."""

    drawing = frozenset({"uniform_", "normal_", "kaiming_uniform_"})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.drawing:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def described(config: NextDiTConfig) -> NextDiT:
    """Build a backbone on the `meta` device, where it has shapes and no memory."""
    try:
        with torch.device("meta"), _Undrawn():
            return NextDiT(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"no backbone has these sizes: {config}: {error}") from error


def own_tensors(config: NextDiTConfig) -> dict[str, Tensor]:
    """Give the state dict of a backbone on the `meta` device."""
    return described(config).state_dict()


def convert(tensors: Mapping[str, Tensor], plan: Mapping[str, Derived]) -> dict[str, Tensor]:
    """Make the tensors of another layout.

    Args:
        tensors: Those of one layout, on any device, `meta` included.
        plan: What each tensor of the other is made of.

    Returns:
        Those of the other layout.
    """
    return dict(iterate(tensors, plan))


def iterate(
    tensors: Mapping[str, Tensor], plan: Mapping[str, Derived]
) -> Iterator[tuple[str, Tensor]]:
    """Make the tensors of another layout one after the other."""
    for name, derived in plan.items():
        yield name, derived.make(*(tensors[source] for source in derived.sources))


def converted_shapes(
    config: NextDiTConfig, plan: Mapping[str, Derived]
) -> dict[str, tuple[int, ...]]:
    """Give the shapes of another layout without allocating it."""
    made = convert(own_tensors(config), plan)
    return {name: tuple(tensor.shape) for name, tensor in made.items()}
