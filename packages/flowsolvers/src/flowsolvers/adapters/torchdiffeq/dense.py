"""A solve that can be asked for the state at any time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowsolvers.adapters.torchdiffeq.integrate import steps_of
from flowsolvers.adapters.torchdiffeq.options import FIXED, choose
from flowsolvers.adaptive import error_of
from flowsolvers.embedded import Interpolant
from flowsolvers.flowing import Flowing
from flowsolvers.marching import StuckError

__all__ = ["odeint_dense"]


def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Tensor | float], Any]:
    """Integrate from t0 to t1 by an adaptive method and return the state as a function of time.

    Args:
        func: As for `odeint`.
        y0: The state at t0.
        t0: Start.
        t1: End, before or after it.
        rtol: As for `odeint`.
        atol: As for `odeint`.
        method: An adaptive one of `METHODS`; `dopri5` when None.
        options: As for `odeint`.

    Returns:
        A function of a time between t0 and t1.

    Raises:
        ValueError: The method has no error estimate; or the function is asked for a time outside.

    Example:
        >>> import torch
        >>> y = odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 1.0)
        >>> y(0.5)
        tensor([0.6065])
    """
    name, settings = choose(method, options)
    if name in FIXED:
        raise ValueError(f"method {name!r} has no dense output; take an adaptive one, as 'dopri5'")
    flow = Flowing(func, y0, per_sample=False)
    start, end = float(t0), float(t1)
    sign = 1.0 if end >= start else -1.0
    kept: list[Interpolant] = []
    try:
        for step in steps_of(func, flow, flow.x0, [start, end], name, settings, rtol, atol):
            kept.append(step.interpolant())
            if sign * float(step.t_next) >= sign * end:
                break
    except StuckError as stuck:
        raise error_of(stuck, flow, 0) from None

    def state(t: Tensor | float) -> Any:
        time = float(t)
        if not sign * start <= sign * time <= sign * end:
            raise ValueError(f"the solve went from {start} to {end}, got t={time}")
        index = bisect.bisect_right(kept, sign * time, key=lambda one: sign * float(one.t)) - 1
        parts = kept[max(index, 0)].at(time)
        return flow.whole([p.to(dtype) for p, dtype in zip(parts, flow.dtypes, strict=True)])

    return state
