"""What a model may want to know about an evaluation, in numbers of the host.

A velocity gets t as a tensor on the device, and to read it there would wait for the device. One
that decides by the time, such as guidance in an interval, gets a `Context` besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

from flowsolvers.velocity import Velocity

__all__ = ["Context", "ContextVelocity", "contextual", "evaluate", "model_rows"]


@dataclass(frozen=True)
class Context:
    """Where in a solve one velocity evaluation stands.

    Args:
        t: Time of the evaluation, in [0, 1], 0 = noise and 1 = data.
        t_next: Time at which the step ends.
        step: Index of the step, from 0.
        steps: Number of steps.
        stage: Index of the evaluation within its step, from 0; above 0 for the later stages of
            a Runge-Kutta method.
        evaluation: Index of the evaluation, from 0; a cache or a momentum starts anew at 0.
        evaluations: Number of evaluations.
        is_last: Whether no evaluation follows.

    Example:
        >>> Context(0.5, 1.0, step=1, steps=2, stage=0, evaluation=1, evaluations=2, is_last=True).t
        0.5
    """

    t: float
    t_next: float
    step: int
    steps: int
    stage: int
    evaluation: int
    evaluations: int
    is_last: bool


@runtime_checkable
class ContextVelocity(Protocol):
    """A velocity that is given the context.

    Its attribute `takes_context` is True, and it is called as `velocity(t, x, context=context)`.
    It must also work without one, since whoever calls it may know nothing but t.
    """

    takes_context: bool

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return dx/dt."""
        ...


_Function = TypeVar("_Function")


def contextual(velocity: _Function) -> _Function:
    """Mark a velocity as one that takes the context.

    Args:
        velocity: A function or module `velocity(t, x, *, context=None) -> dx/dt`.

    Returns:
        The same object, with `takes_context` set to True.

    Example:
        >>> @contextual
        ... def velocity(t, x, *, context=None):
        ...     return x if context is None or context.t < 0.5 else -x
        >>> velocity.takes_context
        True
    """
    vars(velocity)["takes_context"] = True
    return velocity


def evaluate(velocity: Velocity, t: Tensor, x: Tensor, context: Context | None) -> Tensor:
    """Call a velocity, with the context if it takes one.

    Args:
        velocity: Any velocity.
        t: 0-dim, in [0, 1].
        x: The state.
        context: Of this evaluation; None if unknown.

    Returns:
        dx/dt.

    Example:
        >>> import torch
        >>> evaluate(lambda t, x: 2 * x, torch.tensor(0.5), torch.ones(2), None)
        tensor([2., 2.])
    """
    if context is not None and getattr(velocity, "takes_context", False):
        return cast("ContextVelocity", velocity)(t, x, context=context)
    return velocity(t, x)


def model_rows(velocity: Velocity, context: Context | None = None) -> int:
    """Count how often an evaluation sends the rows of the state through a model.

    Args:
        velocity: Any velocity. Guided ones have a method `rows(context)`; others count 1.
        context: Of the evaluation; None counts as inside every interval.

    Returns:
        2 for classifier-free guidance inside its interval and 1 outside, for example.

    Example:
        >>> from flowsolvers import guided
        >>> model_rows(guided(lambda t, x: x, lambda t, x: -x, scale=4.0))
        2
    """
    rows = getattr(velocity, "rows", None)
    return 1 if rows is None else rows(context)
