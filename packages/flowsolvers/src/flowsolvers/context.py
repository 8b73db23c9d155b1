"""What a model may want to know about an evaluation, in numbers of the host.

A velocity gets t as a tensor on the device, and to read it there would wait for the device. One
that decides by the time, such as guidance in an interval, gets a `Context` besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

from flowsolvers.velocity import Velocity

__all__ = ["Context", "ContextVelocity", "contextual", "evaluate", "jumps", "model_rows"]


@dataclass(frozen=True)
class Context:
    """Where in a solve one velocity evaluation stands.

    `solve` knows all of it beforehand. `solve_adaptive` does not know how many evaluations are to
    come, and the end of a step only once it is attempted; what is not known is None.

    Args:
        t: Time of the evaluation, 0 = noise and 1 = data; in [0, 1] in a solve on a budget.
        t_next: Time at which the step ends; None before the first attempt of a step.
        step: Index of the step, from 0. An attempt that is rejected is made again under the same.
        steps: Number of steps; None if they are as many as it takes.
        stage: Index of the evaluation within its step, from 0; above 0 for the later stages of
            a Runge-Kutta method.
        evaluation: Index of the evaluation, from 0; a cache or a momentum starts anew at 0.
        evaluations: Number of evaluations; None if they are as many as it takes.
        is_last: Whether no evaluation follows; None if that is not known.
        t_start: Time at which the step starts; None where it is not known.

    Example:
        >>> Context(0.5, 1.0, step=1, steps=2, stage=0, evaluation=1, evaluations=2, is_last=True).t
        0.5
    """

    t: float
    t_next: float | None
    step: int
    steps: int | None
    stage: int
    evaluation: int
    evaluations: int | None
    is_last: bool | None
    t_start: float | None = None

    @property
    def evaluations_left(self) -> int | None:
        """Number of evaluations after this one; None if they are as many as it takes."""
        return None if self.evaluations is None else self.evaluations - self.evaluation - 1

    def within(self, low: float, high: float) -> bool:
        """Tell whether the evaluation is inside an interval of time.

        At an edge of the interval it is inside if its step is: a step that ends at an edge is not
        of the same part as one that starts there.

        Args:
            low: First time.
            high: Last time.

        Returns:
            Whether it is inside.

        Example:
            >>> edge = Context(0.5, 0.6, 5, 10, 0, 5, 10, is_last=False, t_start=0.5)
            >>> edge.within(0.2, 0.5), edge.within(0.5, 0.8)
            (False, True)
        """
        t = self.t
        if t in (low, high) and self.t_start is not None and self.t_next is not None:
            t = (self.t_start + self.t_next) / 2
        return low <= t <= high


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


def model_rows(velocity: object, context: Context | None = None) -> int:
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


def jumps(velocity: object) -> tuple[float, ...]:
    """Ask a velocity at which times it jumps.

    Args:
        velocity: Any velocity. Guided ones have an attribute `jumps`; others have none.

    Returns:
        Times in [0, 1], in any order, some perhaps twice.

    Example:
        >>> from flowsolvers import guided
        >>> jumps(guided(lambda t, x: x, lambda t, x: -x, interval=(0.2, 1.0)))
        (0.2, 1.0, 0.0)
    """
    return tuple(getattr(velocity, "jumps", ()))
