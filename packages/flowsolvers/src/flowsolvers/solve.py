"""Integrate a flow: check what was given, carry out the plan, say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec

from flowsolvers.ask import asker
from flowsolvers.context import jumps as jumps_of
from flowsolvers.context import model_rows
from flowsolvers.execute import execute
from flowsolvers.layout import plan as lay_out
from flowsolvers.plan import Plan
from flowsolvers.program import compiled, contexts
from flowsolvers.schedules import Schedule
from flowsolvers.states import Leaves, State, cast, each, flatten, unflatten
from flowsolvers.watch import NotFiniteError, Observer, Reached, finite

__all__ = ["Solution", "solve"]

#: A state on the CPU that is smaller is looked at when all is done.
_LARGE = 4096

#: Beside a step of this many seconds, a look at its end costs next to nothing.
_SLOW = 1e-3


@dataclass(frozen=True, eq=False)
class Solution(Generic[State]):
    """Where the flow ends.

    Args:
        x: The state at the end, like x0; float32, or float64 where x0 is float64.
        nfe: Velocity evaluations made.
        rows: How often the rows of the state went through a model; guidance takes two or more an
            evaluation (see `model_rows`).
        plan: The table that was carried out.
        t: The time of x: the plan's end, unless `on_step` stopped before.
        errors: With `estimate`, for each step the root mean square of its end less its
            prediction, `[steps]`; NaN for steps that have none.
        trajectory: With `trajectory`, the states at `plan.times` as far as the solve came, the
            first x0.
    """

    x: State
    nfe: int
    rows: int
    plan: Plan
    t: float = 1.0
    errors: Tensor | None = None
    trajectory: tuple[State, ...] | None = None


def solve(
    velocity: Callable[[Tensor, State], State],
    x0: State,
    *,
    nfe: int | None = None,
    solver: str | None = None,
    schedule: Schedule | None = None,
    start: float = 0.0,
    end: float = 1.0,
    jumps: Iterable[float] = (),
    plan: Plan | None = None,
    on_step: Callable[[Reached[State]], object] | None = None,
    trajectory: bool = False,
    estimate: bool = False,
    check: bool | None = None,
) -> Solution[State]:
    """Integrate dx/dt = velocity(t, x) from noise to data.

    The state is kept in float32 (float64 where x0 is float64) whatever the model's dtype, so
    rounding does not grow with the number of steps. All times are put on x0's device before
    the loop, which then never waits for the device. Grad mode is the caller's.

    Args:
        velocity: `velocity(t, x) -> dx/dt`; one that is `contextual` is given a `Context` besides.
            t is a 0-dim tensor on x0's device, in the state's dtype; x is like x0 and must not be
            written to; the result is like x0, of any floating dtype.
        x0: The state at the start: a floating-point tensor of any shape, or a tree (lists, tuples,
            dicts) of such tensors on one device.
        nfe: Velocity evaluations, at least 1. Give this or `plan`.
        solver: One of `solvers()`; `auto` when None, which chooses order and grid by the budget.
        schedule: The time grid; the solver's own, or `uniform()`, when None.
        start: Time of x0, in [0, 1]: above 0 where x0 is data with some noise (see `noised`).
        end: Time to end at, in [0, 1]; before start to go from data back to noise.
        jumps: Times at which the velocity jumps, such as a change of prompt, as for
            `flowsolvers.plan`; those that the velocity itself knows, such as the edges of its
            interval of guidance, are added where the budget allows.
        plan: A table made before, in place of nfe, solver, schedule, start, end and jumps.
        on_step: Called with a `Reached` at each step's end; it may replace the state or stop.
        trajectory: Whether to return the states at all steps' ends.
        estimate: Whether to return an estimate of each step's error, which costs no evaluation,
            where steps evaluate at their own end (`heun`, `pec1` to `pec3`, `unipc2`, `unipc3`).
        check: Whether to look after each step if the state is finite. None looks after slow steps
            on the CPU, and everywhere at the end; on other devices a look waits for the device.
            False never looks.

    Returns:
        The state at the end, in the state's dtype, and what it took.

    Raises:
        ValueError: Both or neither of `plan` and `nfe` are given, `plan` comes with what it
            holds, x0 is not of floating-point tensors on one device, the velocity is not like x0,
            or a name or number is not accepted by `flowsolvers.plan`.
        NotFiniteError: The state became NaN or infinite. Where it was found at the end, the
            plan is carried out again up to there, to name the step.

    Convention: t=0 is noise and t=1 is data; velocity points from noise to data.

    Example:
        >>> solution = solve(lambda t, x: x, torch.ones(2), nfe=8, solver="rk4")
        >>> solution.x, solution.nfe
        (tensor([2.7173, 2.7173]), 8)
    """
    leaves, spec = flatten(x0)
    state, device = _kind(leaves)
    if plan is None:
        if nfe is None:
            raise ValueError("neither nfe nor plan is given; give one, as in nfe=20")
        times = _jumps(tuple(jumps), jumps_of(velocity), nfe, (start, end))
        name = "auto" if solver is None else solver
        plan = lay_out(name, nfe=nfe, schedule=schedule, start=start, end=end, jumps=times)
    elif (nfe, solver, schedule, start, end, tuple(jumps)) != (None, None, None, 0.0, 1.0, ()):
        raise ValueError(
            "a plan already holds nfe, solver, schedule, start, end and jumps; give it or them, "
            "not both"
        )
    contextual = bool(getattr(velocity, "takes_context", False))
    x = cast(leaves, state)
    looks = check is not False and _may_look(device)
    closely = looks and bool(check or (device.type == "cpu" and (on_step is not None or _large(x))))
    program = compiled(plan, state, device, contextual=contextual)
    ask = asker(velocity, leaves, spec, state, program)
    observer = None
    if on_step is not None or trajectory or estimate or closely:
        observer = Observer(
            plan,
            spec,
            x,
            on_step=on_step,
            states=trajectory,
            estimate=estimate,
            look=closely,
            unless_quicker=0.0 if check or on_step is not None else _SLOW,
        )
    found = execute(ask, x, program, observer)
    if looks and not check and not finite(found):
        if on_step is None:
            execute(ask, x, program, Observer(plan, spec, x, look=True))
        raise NotFiniteError(
            "the state is NaN or infinite at the end; check=True looks after each step and names "
            "the one",
            x0,
            plan.steps[0].t,
            None,
            None,
        )
    return _solution(velocity, found, plan, spec, observer)


def _kind(leaves: Leaves) -> tuple[torch.dtype, torch.device]:
    """Choose the state's dtype, and find its device."""
    if isinstance(leaves, Tensor) and leaves.dtype in (torch.float32, torch.float64):
        return leaves.dtype, leaves.device  # most often
    tensors = each(leaves)
    for leaf in tensors:
        if not leaf.is_floating_point():
            raise ValueError(
                f"x0 must be floating point, got {leaf.dtype}; convert it with x0.float()"
            )
    devices = {leaf.device for leaf in tensors}
    if len(devices) > 1:
        raise ValueError(f"x0 must be on one device, got {sorted(map(str, devices))}")
    doubles = any(leaf.dtype == torch.float64 for leaf in tensors)
    return torch.float64 if doubles else torch.float32, tensors[0].device


def _jumps(
    asked: tuple[float, ...], own: tuple[float, ...], nfe: int, ends: tuple[float, float]
) -> tuple[float, ...]:
    """Join the jumps that were asked for with the velocity's, where two evaluations fit a part."""
    both = (*asked, *own)
    inside = {t for t in both if min(ends) < t < max(ends)}
    return both if isinstance(nfe, int) and 2 * (len(inside) + 1) <= nfe else asked


def _large(x: Leaves) -> bool:
    return sum(leaf.numel() for leaf in each(x)) >= _LARGE


def _may_look(device: torch.device) -> bool:
    """Tell whether reading a number is possible here at all."""
    kind = device.type
    if kind == "meta" or torch.compiler.is_compiling():
        return False
    return kind != "cuda" or not torch.cuda.is_current_stream_capturing()


def _solution(
    velocity: Callable[[Tensor, State], State],
    x: Leaves,
    plan: Plan,
    spec: TreeSpec | None,
    observer: Observer | None,
) -> Solution[State]:
    nfe = plan.nfe if observer is None else observer.evaluations
    if getattr(velocity, "takes_context", False):
        rows = sum(model_rows(velocity, context) for context in contexts(plan)[:nfe])
    else:
        rows = nfe * model_rows(velocity)
    state: State = unflatten(x, spec)
    if observer is None:
        return Solution(state, nfe, rows, plan, plan.steps[-1].t_next)
    errors = None if observer.errors is None else torch.stack(observer.errors)
    states = observer.states
    return Solution(
        state,
        nfe,
        rows,
        plan,
        observer.t,
        errors,
        None if states is None else tuple(unflatten(one, spec) for one in states),
    )
