"""A state is one tensor, or a tree of tensors of different shapes: what adds either up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = [
    "Arithmetic",
    "Leaves",
    "State",
    "arithmetic",
    "cast",
    "each",
    "flatten",
    "unflatten",
]

#: A tensor, or lists, tuples, named tuples and dicts of states, to any depth.
State = TypeVar("State")

#: A state as the loops hold it: the tensor itself, or all of a tree's tensors in order.
Leaves: TypeAlias = "Tensor | Sequence[Tensor]"


@dataclass(frozen=True)
class Arithmetic:
    """The three operations that a plan is carried out with; `add_` and `mul` take a number last.

    Args:
        add: add(x, v, alpha=w) makes x + w·v.
        add_: The same, into x.
        mul: mul(x, w) makes w·x.
    """

    add: Callable[..., Any]
    add_: Callable[..., Any]
    mul: Callable[..., Any]


#: Of one tensor.
_TENSOR = Arithmetic(Tensor.add, Tensor.add_, Tensor.mul)

#: Of lists of tensors, each list in one launch where the device can.
_LISTS = Arithmetic(torch._foreach_add, torch._foreach_add_, torch._foreach_mul)


def flatten(state: object) -> tuple[Leaves, TreeSpec | None]:
    """Take a state apart.

    Args:
        state: A tensor or a tree of tensors.

    Returns:
        The tensor and None; or the tree's tensors in order, and what puts them together again.

    Raises:
        ValueError: A leaf is not a tensor, or there is none.

    Example:
        >>> leaves, _ = flatten({"image": torch.zeros(2, 3), "sound": torch.zeros(4)})
        >>> [tuple(leaf.shape) for leaf in leaves]
        [(2, 3), (4,)]
    """
    if isinstance(state, Tensor):
        return state, None
    leaves, spec = tree_flatten(state)
    strangers = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if strangers or not leaves:
        raise ValueError(
            f"a state must be a tensor or a tree (list, tuple, dict) of tensors, got "
            f"{type(state).__name__} with {', '.join(sorted(set(strangers))) or 'no tensor'}"
        )
    return leaves, spec


def unflatten(leaves: Leaves, spec: TreeSpec | None) -> Any:
    """Put together what `flatten` took apart.

    Args:
        leaves: As `flatten` returned, or others in their place.
        spec: As `flatten` returned.

    Returns:
        The tensor, or the tree.

    Example:
        >>> unflatten(*flatten((torch.zeros(1), torch.ones(1))))
        (tensor([0.]), tensor([1.]))
    """
    return leaves if spec is None else tree_unflatten(list(each(leaves)), spec)


def arithmetic(leaves: Leaves) -> Arithmetic:
    """Choose the operations for a state's form."""
    return _TENSOR if isinstance(leaves, Tensor) else _LISTS


def cast(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """Convert every tensor; one that has the dtype is not copied."""
    if isinstance(leaves, Tensor):
        return leaves if leaves.dtype is dtype else leaves.to(dtype)
    return [leaf.to(dtype) for leaf in leaves]


def each(leaves: Leaves) -> Sequence[Tensor]:
    """List the tensors."""
    return [leaves] if isinstance(leaves, Tensor) else leaves
