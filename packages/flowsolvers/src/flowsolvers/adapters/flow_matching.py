"""The surface of flow_matching's `ODESolver` over our solvers.

For code that was written for it; the model is called as `velocity_model(x=x, t=t, **extras)`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowsolvers.adaptive import solve_adaptive
from flowsolvers.embedded import largest_rms
from flowsolvers.likelihood import probe_signs, with_divergence
from flowsolvers.pairs import PAIRS
from flowsolvers.plan import Plan
from flowsolvers.solve import solve
from flowsolvers.spelling import closest_first
from flowsolvers.states import State, each, flatten, unflatten
from flowsolvers.tableaus import EULER, HEUN, HEUN3, MIDPOINT, RK38, Tableau

__all__ = ["ODESolver"]

#: Methods of fixed steps by the names of torchdiffeq, whose rk4 is the 3/8 rule.
_FIXED: dict[str, Tableau] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN,
    "heun3": HEUN3,
    "rk4": RK38,
}

_FORWARD, _BACKWARD = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])


class ODESolver:
    """Sample a flow, and find how probable data are under it.

    Args:
        velocity_model: `velocity_model(x=x, t=t, **extras) -> dx/dt`, with x `[B, ...]`, t 0-dim
            in [0, 1], 0 = noise and 1 = data, and the result shaped like x.

    Convention: As in flow_matching, `step_size` divides the times that `time_grid` spans. Here each
        interval of the grid is divided by itself, its last step being what is left over, so that
        intermediate states are states of the solution and not interpolated. Adaptive methods end
        at the last time, where torchdiffeq's step over it and interpolate.

    Source: The published interface of facebookresearch/flow_matching; Lipman et al., Flow Matching
        Guide and Code, arXiv 2412.06264.

    Example:
        >>> solver = ODESolver(lambda x, t: torch.full_like(x, 3.0) * t**2)
        >>> solver.sample(torch.zeros(2), step_size=0.25, method="rk4")
        tensor([1., 1.])
    """

    def __init__(self, velocity_model: Callable[..., Tensor]) -> None:
        self.velocity_model = velocity_model

    def sample(
        self,
        x_init: Tensor,
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | Iterable[float] = _FORWARD,
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """Follow the flow along the times of a grid.

        Args:
            x_init: The state at the first time, `[B, ...]`.
            step_size: Length of a step, greater than 0; None steps from one time of the grid to
                the next. Adaptive methods choose their own.
            method: `euler`, `midpoint`, `heun2`, `heun3` or `rk4`, on the grid; or, to a tolerance,
                `dopri5`, `bosh3`, `tsit5`, `dopri8`, `adaptive_heun` or `fehlberg2`.
            atol: Absolute tolerance of an adaptive method.
            rtol: Relative tolerance of an adaptive method.
            time_grid: Times in [0, 1], at least two, increasing, or decreasing for the way back.
            return_intermediates: Whether to return the states at all times of the grid.
            enable_grad: Whether the result can be differentiated.
            **model_extras: Passed on to the model.

        Returns:
            The state at the last time, shaped like x_init and in its dtype; with
            `return_intermediates` those at all times, `[T, B, ...]`.

        Raises:
            ValueError: The method is unknown, the step is not greater than 0, or the times are
                fewer than two, leave [0, 1] or do not go one way.
            AdaptiveError: An adaptive method could not go on; see `flowsolvers.solve_adaptive`.
        """
        velocity, times = self._velocity(model_extras), _times(time_grid)
        with torch.set_grad_enabled(enable_grad):
            states = _states(velocity, x_init, times, step_size, method, atol, rtol)
            found = torch.stack(states) if return_intermediates else states[-1]
            return found.to(x_init.dtype)

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None = None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor | Iterable[float] = _BACKWARD,
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> tuple[Tensor, Tensor]:
        """Follow data back to noise, and find their log density.

        log p1(x_1) = log p0(x_0) - ∫ div v dt. Without `exact_divergence` the divergence is
        estimated with one probe of signs, drawn once for the whole solve from a seed of torch's
        global generator.

        Args:
            x_1: Data, `[B, ...]`, floating point.
            log_p0: Log density of the noise, `[B, ...]` to `[B]`.
            step_size: As for `sample`.
            method: As for `sample`.
            atol: As for `sample`; of the log density too.
            rtol: As for `sample`.
            time_grid: From 1 to 0.
            return_intermediates: Whether to return the states at all times of the grid.
            exact_divergence: Whether to spend a product with the Jacobian on each dimension.
            enable_grad: Not available; the result has no gradient.
            **model_extras: Passed on to the model.

        Returns:
            The noise, or with `return_intermediates` the states at all times, `[T, B, ...]`; and
            the log density of each sample in nats, `[B]`.

        Raises:
            ValueError: As for `sample`; the grid does not run from 1 to 0; or a gradient is asked
                for.
            AdaptiveError: As for `sample`.
        """
        if enable_grad:
            raise ValueError("compute_likelihood keeps no gradient; leave enable_grad=False")
        times = _times(time_grid)
        if (times[0], times[-1]) != (1.0, 0.0):
            raise ValueError(
                f"time_grid must run from 1 to 0 for a likelihood, got {times[0]:g} to "
                f"{times[-1]:g}"
            )
        signs = None
        if not exact_divergence:
            seed = int(torch.randint(2**62, ()).item())
            signs = probe_signs(x_1, 1, torch.Generator(x_1.device).manual_seed(seed))
        augmented = with_divergence(self._velocity(model_extras), x_1, signs)
        with torch.no_grad():
            precise = torch.float64 if x_1.dtype == torch.float64 else torch.float32
            volume = torch.zeros(len(x_1), dtype=precise, device=x_1.device)
            states = _states(augmented, (x_1, volume), times, step_size, method, atol, rtol)
            x_0, volume = states[-1]
            log_p = log_p0(x_0) + volume
            found = torch.stack([x for x, _ in states]) if return_intermediates else x_0
        return found, log_p

    def _velocity(self, extras: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, x: self.velocity_model(x=x, t=t, **extras)


def _states(
    velocity: Callable[[Tensor, State], State],
    x: State,
    times: list[float],
    step_size: float | None,
    method: str,
    atol: float,
    rtol: float,
) -> list[State]:
    """Give the states at the times, x at the first."""
    if method in _FIXED:
        return _fixed(velocity, x, times, step_size, _FIXED[method])
    if step_size is not None:
        warnings.warn(
            f"method {method!r} chooses its steps by atol and rtol; step_size is of no use to it",
            stacklevel=3,
        )
    return _adaptive(velocity, x, times, method, atol, rtol)


def _fixed(
    velocity: Callable[[Tensor, State], State],
    x: State,
    times: list[float],
    step_size: float | None,
    tableau: Tableau,
) -> list[State]:
    ends, marks = _divided(times, step_size)
    steps = tuple(tableau.step(t, t_next) for t, t_next in pairwise(ends))
    plan = Plan("fixed", "time_grid", steps)
    if len(marks) == 2:  # nobody sees the states between
        return [x, solve(velocity, x, plan=plan).x]
    path = solve(velocity, x, plan=plan, trajectory=True).trajectory
    return [] if path is None else [path[i] for i in marks]


def _adaptive(
    velocity: Callable[[Tensor, State], State],
    x: State,
    times: list[float],
    method: str,
    atol: float,
    rtol: float,
) -> list[State]:
    if method not in PAIRS:
        names = ", ".join(closest_first(method, (*_FIXED, *PAIRS)))
        raise ValueError(f"unknown method {method!r}; accepted, closest first: {names}")
    found = solve_adaptive(
        velocity,
        x,
        rtol=rtol,
        atol=atol,
        pair=method,
        start=times[0],
        end=times[-1],
        at=times,
        norm=lambda state: largest_rms(list(each(flatten(state)[0]))),  # torchdiffeq's of tuples
    )
    leaves, spec = flatten(found.states)
    states = zip(*(leaf.unbind() for leaf in each(leaves)), strict=True)
    return [unflatten(state[0] if spec is None else list(state), spec) for state in states]


def _times(grid: Tensor | Iterable[float]) -> list[float]:
    times = [float(t) for t in (grid.tolist() if isinstance(grid, Tensor) else grid)]
    one_way = all(a < b for a, b in pairwise(times)) or all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not one_way or not all(0.0 <= t <= 1.0 for t in times):
        raise ValueError(
            f"time_grid must be at least two times in [0, 1] that all increase, or all decrease, "
            f"got {times}"
        )
    return times


def _divided(times: list[float], step_size: float | None) -> tuple[list[float], list[int]]:
    """Divide each interval into steps; give all ends, and which of them are the times."""
    if step_size is None:
        return times, list(range(len(times)))
    if not step_size > 0.0:
        raise ValueError(f"step_size must be greater than 0, got {step_size!r}")
    ends, marks = [times[0]], [0]
    for t, t_next in pairwise(times):
        count = math.ceil(abs(t_next - t) / step_size - 1e-6)  # not a step more by rounding
        step = math.copysign(step_size, t_next - t)
        ends += [*(t + i * step for i in range(1, count)), t_next]
        marks.append(len(ends) - 1)
    return ends, marks
