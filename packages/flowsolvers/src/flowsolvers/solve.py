"""Carry out a plan: one loop for every solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowsolvers.context import Context, evaluate, model_rows
from flowsolvers.layout import plan as lay_out
from flowsolvers.plan import Plan, Row, Step
from flowsolvers.schedules import Schedule
from flowsolvers.velocity import Velocity

__all__ = ["Solution", "solve"]


@dataclass(frozen=True, eq=False)
class Solution:
    """Where the flow ends.

    Args:
        x: The state at t=1, shaped like x0; float32, or float64 when x0 is float64.
        nfe: Velocity evaluations made.
        rows: How often the rows of the state went through a model; guidance takes two or more an
            evaluation (see `model_rows`).
    """

    x: Tensor
    nfe: int
    rows: int


def solve(
    velocity: Velocity,
    x0: Tensor,
    *,
    nfe: int | None = None,
    solver: str | None = None,
    schedule: Schedule | None = None,
    plan: Plan | None = None,
) -> Solution:
    """Integrate dx/dt = velocity(t, x) from noise to data.

    The state is kept in float32 (float64 when x0 is float64) whatever the model's dtype, so
    rounding does not grow with the number of steps. All times are put on x0's device before
    the loop, which then never waits for the device. Grad mode is the caller's.

    Args:
        velocity: `velocity(t, x) -> dx/dt`; one that is `contextual` is given a `Context` besides.
            t is a 0-dim tensor on x0's device, in the state's
            dtype; x has x0's shape and dtype and must not be written to; the result has x0's shape.
        x0: The state at the plan's start, any shape, floating point.
        nfe: Velocity evaluations, at least 1. Give this or `plan`.
        solver: One of `solvers()`; `midpoint` when None.
        schedule: The time grid; `uniform()` when None.
        plan: A table made before, in place of nfe, solver and schedule.

    Returns:
        The state at the end, in the state's dtype, and the evaluations made.

    Raises:
        ValueError: Both or neither of `plan` and `nfe` are given, `plan` comes with a solver
            or a schedule, x0 is not floating point, the velocity's shape is not x0's, or a
            name or number is not accepted by `flowsolvers.plan`.

    Convention: t=0 is noise and t=1 is data; velocity points from noise to data.

    Example:
        >>> solution = solve(lambda t, x: x, torch.ones(2), nfe=8, solver="rk4")
        >>> solution.x, solution.nfe
        (tensor([2.7173, 2.7173]), 8)
    """
    if plan is None:
        if nfe is None:
            raise ValueError("neither nfe nor plan is given; give one, as in nfe=20")
        plan = lay_out("midpoint" if solver is None else solver, nfe=nfe, schedule=schedule)
    elif not (nfe is None and solver is None and schedule is None):
        raise ValueError("a plan already holds nfe, solver and schedule; give it or them, not both")
    if not x0.is_floating_point():
        raise ValueError(f"x0 must be floating point, got {x0.dtype}; convert it with x0.float()")
    contexts = _contexts(plan) if getattr(velocity, "takes_context", False) else None
    x = _execute(velocity, x0, plan, contexts)
    if contexts is None:
        return Solution(x, plan.nfe, plan.nfe * model_rows(velocity))
    return Solution(x, plan.nfe, sum(model_rows(velocity, context) for context in contexts))


def _contexts(plan: Plan) -> list[Context]:
    """Say of each evaluation where it stands."""
    contexts: list[Context] = []
    for index, step in enumerate(plan.steps):
        for stage, row in enumerate(step.rows):
            count = len(contexts)
            contexts.append(
                Context(
                    t=row.t,
                    t_next=step.t_next,
                    step=index,
                    steps=len(plan.steps),
                    stage=stage,
                    evaluation=count,
                    evaluations=plan.nfe,
                    is_last=count == plan.nfe - 1,
                )
            )
    return contexts


def _execute(velocity: Velocity, x0: Tensor, plan: Plan, contexts: list[Context] | None) -> Tensor:
    state, model = torch.float64 if x0.dtype == torch.float64 else torch.float32, x0.dtype
    times = [row.t for step in plan.steps for row in step.rows]
    clock = iter(torch.tensor(times, dtype=state, device=x0.device).unbind())
    x = x0.to(state)
    shape = x.shape
    following = None if contexts is None else iter(contexts)
    kept: list[Tensor] = []  # of earlier evaluations, the newest last
    for step, carried in zip(plan.steps, plan.carried, strict=True):
        for row in step.rows:
            point = x if row.scale == 1.0 and not row.weights else _combine(x, row, kept)
            seen = point if point.dtype == model else point.to(model)
            if following is None:
                v = velocity(next(clock), seen)
            else:
                v = evaluate(velocity, next(clock), seen, next(following))
            if v.shape != shape:
                raise ValueError(
                    f"velocity returned shape {tuple(v.shape)} for x of shape {tuple(shape)}; "
                    f"it must return dx/dt, shaped like x"
                )
            if v.dtype != state:
                v = v.to(state)
            kept.append(v if row.keep == _VELOCITY else _keep(point, v, row.keep))
            del point, seen, v  # what the model made is freed as soon as nothing needs it
        x = _combine(x, step, kept)
        del kept[: len(kept) - carried]
    return x


#: Keep the velocity itself.
_VELOCITY = (0.0, 1.0)


def _keep(point: Tensor, v: Tensor, weights: tuple[float, float]) -> Tensor:
    scaled = point if weights[0] == 1.0 else point * weights[0]
    return scaled.add(v, alpha=weights[1])


def _combine(x: Tensor, table: Row | Step, kept: list[Tensor]) -> Tensor:
    """Return scale·x + Σ_i weights[i]·kept; x is untouched, and at most one tensor is made."""
    total, weights = x, table.weights
    if table.scale != 1.0:
        total = x * table.scale
    index = -len(weights)
    for weight in weights:
        if weight:
            if total is x:
                total = x.add(kept[index], alpha=weight)
            else:
                total.add_(kept[index], alpha=weight)
        index += 1
    return total
