"""Ask a velocity for dx/dt, in the form that the loop computes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from flowsolvers.context import evaluate
from flowsolvers.program import Program
from flowsolvers.states import Leaves, cast, each, flatten, unflatten

__all__ = ["asker"]


def asker(
    velocity: Any, x0: Leaves, spec: TreeSpec | None, state: torch.dtype, program: Program
) -> Callable[[Any, Leaves], Leaves]:
    """Wrap a velocity: the model sees x in its own dtype and form, the loop sees the state's.

    Args:
        velocity: Any velocity.
        x0: What the solve was given; its dtypes are the model's.
        spec: Of its tree.
        state: The state's dtype.
        program: For naming an evaluation in errors.

    Returns:
        ask(tick, x) to dx/dt, with the tick of a move.
    """
    contextual = bool(getattr(velocity, "takes_context", False))
    conform = _conformer(x0, spec, state, program)
    if isinstance(x0, Tensor) and x0.dtype is state and not contextual:
        shape, device, first = x0.shape, x0.device, program.moves[0].tick

        def ask(tick: Any, x: Leaves) -> Leaves:
            v = velocity(tick, x)
            if v.dtype is state and v.shape == shape and (tick is not first or v.device == device):
                return v
            return conform(v, tick)

        return ask

    tensors = each(x0)
    same = all(leaf.dtype is state for leaf in tensors)

    def ask_any(tick: Any, x: Leaves) -> Leaves:
        seen = x
        if not same:
            cast_leaves = [a.to(b.dtype) for a, b in zip(each(x), tensors, strict=True)]
            seen = cast_leaves[0] if isinstance(x, Tensor) else cast_leaves
        whole = unflatten(seen, spec)
        t, context = tick if contextual else (tick, None)
        return conform(evaluate(velocity, t, whole, context), tick)

    return ask_any


def _conformer(
    x0: Leaves, spec: TreeSpec | None, state: torch.dtype, program: Program
) -> Callable[[Any, Any], Leaves]:
    def conform(v: Any, tick: Any) -> Leaves:
        """Refuse what is not like x, and convert the rest."""
        tensors = each(x0)
        device = tensors[0].device
        leaves, found = flatten(v)
        parts = each(leaves)
        if found != spec or [part.shape for part in parts] != [leaf.shape for leaf in tensors]:
            problem = f"returned shape {_shapes(parts)} for x of shape {_shapes(tensors)}"
        elif not all(part.is_floating_point() for part in parts):
            problem = f"returned {', '.join(str(part.dtype) for part in parts)}"
        elif not all(part.device == device for part in parts):
            problem = f"returned a tensor on {parts[0].device} for x on {device}"
        else:
            return cast(leaves, state)
        ticks = [move.tick for move in program.moves if move.tick is not None]
        index = next(i for i, one in enumerate(ticks) if one is tick)
        t = tick if isinstance(tick, Tensor) else tick[0]
        raise ValueError(
            f"velocity {problem} at evaluation {index} of {len(ticks)}, t={t.item():.6g}; it must "
            f"return dx/dt, like x, in a floating dtype"
        )

    return conform


def _shapes(parts: Sequence[Tensor]) -> str:
    shapes = [tuple(part.shape) for part in parts]
    return str(shapes[0] if len(shapes) == 1 else shapes)
