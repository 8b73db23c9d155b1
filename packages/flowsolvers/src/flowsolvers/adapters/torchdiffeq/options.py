"""The dictionary of options, checked and named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowsolvers.adapters.torchdiffeq.adams import Adams
from flowsolvers.adapters.torchdiffeq.stages import tableau_step
from flowsolvers.control import Controller
from flowsolvers.embedded import Field, Norm, State, Tolerance, largest_rms
from flowsolvers.flowing import Flowing
from flowsolvers.marching import March
from flowsolvers.pairs import PAIRS
from flowsolvers.spelling import closest_first
from flowsolvers.tableaus import EULER, HEUN, HEUN3, MIDPOINT, RK38, Tableau

__all__ = ["FIXED", "METHODS", "Grid", "callbacks", "choose", "march_of", "norm_of", "tolerance_of"]

#: The Runge-Kutta methods on a grid, by torchdiffeq's names.
TABLEAUS: dict[str, Tableau] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN,
    "heun3": HEUN3,
    "rk4": RK38,
}

#: The multistep methods on a grid, and whether they are implicit.
MULTISTEP = {"explicit_adams": False, "implicit_adams": True, "fixed_adams": True}

#: The methods on a grid.
FIXED = (*TABLEAUS, *MULTISTEP)

#: All methods.
METHODS = (*FIXED, *PAIRS)

#: What a method calls besides the function.
_ADAPTIVE_CALLS = {"step": "callback_step", "accept": "callback_accept_step"}
_ADAPTIVE_CALLS["reject"] = "callback_reject_step"

_ADAPTIVE_OPTIONS = {
    "norm",
    "first_step",
    "min_step",
    "max_step",
    "step_t",
    "jump_t",
    "safety",
    "ifactor",
    "dfactor",
    "max_num_steps",
    "dtype",
}
_GRID_OPTIONS = {"norm", "step_size", "grid_constructor", "interp", "perturb"}
_MULTISTEP_OPTIONS = _GRID_OPTIONS | {"max_order", "max_iters"}


def choose(method: str | None, options: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Settle the method and its options.

    Raises:
        ValueError: The method is not one of `METHODS`.
    """
    name = "dopri5" if method is None else method
    if name not in METHODS:
        raise ValueError(
            f"method {method!r} is not carried; accepted, closest first: "
            f"{', '.join(closest_first(str(method), METHODS))}"
        )
    found = dict(options or {})
    known = _MULTISTEP_OPTIONS if name in MULTISTEP else _GRID_OPTIONS
    unknown = found.keys() - (known if name in FIXED else _ADAPTIVE_OPTIONS)
    if unknown:
        warnings.warn(f"method {name!r} has no options {sorted(unknown)}", stacklevel=3)
    return name, found


#: method(flow, t, t_next, x, side) to the state at t_next and the slope at t; it may remember.
GridMethod: TypeAlias = Callable[[Field, float, float, State, float], tuple[State, State]]


@dataclass(frozen=True)
class Grid:
    """How a method on a grid is to step."""

    stepper: Callable[[], GridMethod]
    step_size: float | None
    constructor: Callable[[Any, Any, Tensor], Tensor] | None
    cubic: bool
    perturb: bool

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any], tolerance: Tolerance) -> Grid:
        """Read the options; the tolerance ends the iterations of an implicit method."""
        step_size, constructor = options.get("step_size"), options.get("grid_constructor")
        if step_size is not None and constructor is not None:
            raise ValueError("step_size and grid_constructor exclude one another; give one")
        interp = options.get("interp", "linear")
        if interp not in ("linear", "cubic"):
            raise ValueError(f"interp must be 'linear' or 'cubic', got {interp!r}")
        return cls(
            lambda: _stepper(method, options, tolerance),
            None if step_size is None else float(step_size),
            constructor,
            interp == "cubic",
            bool(options.get("perturb", False)),
        )


def _stepper(method: str, options: Mapping[str, Any], tolerance: Tolerance) -> GridMethod:
    if method in MULTISTEP:
        return Adams(MULTISTEP[method], options, tolerance).step
    return lambda flow, t, t_next, x, side: tableau_step(flow, TABLEAUS[method], t, t_next, x, side)


def march_of(
    flow: Flowing[Any],
    method: str,
    options: Mapping[str, Any],
    tolerance: Tolerance,
    watch: Callable[[str, float, float, State], None],
) -> March:
    """Read the options of an adaptive method."""

    def number(name: str, otherwise: float) -> float:
        return float(options.get(name, otherwise))

    controller = Controller(
        safety=number("safety", 0.9),
        shrink=number("dfactor", 0.2),
        grow=number("ifactor", 10.0),
        min_step=number("min_step", 0.0),
        max_step=number("max_step", float("inf")),
    )
    first = options.get("first_step")
    return March(
        PAIRS[method],
        tolerance,
        controller,
        None if first is None else float(first),
        jumps=_times(options, "jump_t"),
        stops=_times(options, "step_t"),
        norm=norm_of(flow, options),
        watch=watch,
    )


def norm_of(flow: Flowing[Any], options: Mapping[str, Any]) -> Norm:
    """Return a norm of lists: the user's, or the largest root mean square of the parts."""
    given = options.get("norm")
    if given is None:
        return largest_rms
    return lambda parts: torch.as_tensor(
        given(flow.whole(parts)), dtype=flow.dtype, device=flow.device
    ).abs()


def tolerance_of(flow: Flowing[Any], rtol: Any, atol: Any) -> Tolerance:
    """Give each tensor of the state its tolerance, from one for all or one for each."""
    return Tolerance(*(_spread(name, tol, flow) for name, tol in (("rtol", rtol), ("atol", atol))))


def callbacks(
    flow: Flowing[Any], func: object, method: str
) -> Callable[[str, float, float, State], None]:
    """Return what tells the callbacks that are attributes of the function."""
    valid = {"step": "callback_step"} if method in FIXED else _ADAPTIVE_CALLS
    idle = [
        name
        for name in _ADAPTIVE_CALLS.values()
        if name not in valid.values() and hasattr(func, name)
    ]
    if idle:
        warnings.warn(f"method {method!r} never calls {', '.join(idle)}", stacklevel=3)
    calls = {event: getattr(func, name, None) for event, name in valid.items()}

    def watch(event: str, t: float, t_next: float, x: State) -> None:
        call = calls[event]
        if call is not None:
            length = torch.tensor(abs(t_next - t), dtype=torch.float64, device=flow.device)
            call(torch.tensor(t, dtype=torch.float64, device=flow.device), flow.whole(x), length)

    return watch


def _spread(name: str, tol: Any, flow: Flowing[Any]) -> list[float | Tensor]:
    if isinstance(tol, Sequence):
        if len(tol) != len(flow.x0):
            raise ValueError(
                f"{name} has {len(tol)} numbers, but y0 has {len(flow.x0)} tensors; give one for "
                f"all, or one for each"
            )
        return [_value(one, flow) for one in tol]
    return [_value(tol, flow)] * len(flow.x0)


def _value(tol: Any, flow: Flowing[Any]) -> float | Tensor:
    if isinstance(tol, Tensor):
        return tol.to(flow.device, flow.dtype)
    return float(tol)


def _times(options: Mapping[str, Any], name: str) -> tuple[float, ...]:
    times = options.get(name)
    return () if times is None else tuple(torch.as_tensor(times).flatten().tolist())
