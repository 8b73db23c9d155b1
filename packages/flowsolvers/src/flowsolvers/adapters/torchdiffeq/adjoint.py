"""Gradients by a second solve, backwards, instead of through the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowsolvers.adapters.torchdiffeq.integrate import odeint
from flowsolvers.states import each, flatten, unflatten

__all__ = ["odeint_adjoint"]


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """Integrate as `odeint` does, in memory that does not grow with the number of steps.

    Backwards, the state is solved again together with its adjoint a, da/dt = -aᵀ ∂f/∂y, and the
    gradients of the parameters. They are those of the exact flow, not of the steps taken.

    Args:
        func: As for `odeint`; a module, or else `adjoint_params` must be given.
        y0: As for `odeint`.
        t: As for `odeint`.
        rtol: As for `odeint`.
        atol: As for `odeint`.
        method: As for `odeint`.
        options: As for `odeint`.
        event_fn: As for `odeint`; the event's time is a constant in gradients.
        adjoint_rtol: Of the solve backwards; `rtol` when None.
        adjoint_atol: Of the solve backwards; `atol` when None.
        adjoint_method: Of the solve backwards; `method` when None.
        adjoint_options: Of the solve backwards; `options` but for its norm when None. The norm
            "seminorm" disregards the parameters' gradients; a function gets the tuple (gradient
            of t, tensors of y, of a, parameters' gradients).
        adjoint_params: What gradients flow to besides y0 and t; the module's parameters when
            None.

    Returns:
        As `odeint`.

    Raises:
        ValueError: As for `odeint`; or func is no module and `adjoint_params` is None; or
            `adjoint_options` is missing although the methods differ.

    Source: Chen et al., Neural Ordinary Differential Equations, arXiv 1806.07366; seminorm:
        Kidger et al., Hey, that's not an ODE, arXiv 2009.09457.

    Example:
        >>> rate = torch.tensor(1.0, requires_grad=True)
        >>> flow = lambda t, y: rate * y
        >>> t = torch.tensor([0.0, 1.0])
        >>> odeint_adjoint(flow, torch.ones(1), t, adjoint_params=[rate])[-1].sum().backward()
        >>> rate.grad
        tensor(2.7183)
    """
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                "func is no nn.Module, so its parameters are not known; give them as "
                "adjoint_params, () for none"
            )
        adjoint_params = func.parameters()
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise ValueError("adjoint_method differs from method: give adjoint_options as well")
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (options or {}).items() if k != "norm"}
    leaves, spec = flatten(y0)
    parts = list(each(leaves))
    backwards = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
        "method": method if adjoint_method is None else adjoint_method,
    }
    if isinstance(backwards["rtol"], Sequence) or isinstance(backwards["atol"], Sequence):
        raise ValueError("tolerances for each tensor need adjoint_rtol and adjoint_atol for all")
    problem = _Problem(
        func,
        len(parts),
        lambda found: found[0] if spec is None else unflatten(list(found), spec),
        {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn},
        backwards,
        _with_norm(adjoint_options, (options or {}).get("norm"), len(parts), spec),
    )
    wanted = [p for p in adjoint_params if p.requires_grad]
    event_t, *found = _Adjoint.apply(problem, t, *parts, *wanted)
    whole = problem.whole(found)
    return whole if event_fn is None else (event_t, whole)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What both solves need."""

    func: Any
    parts: int
    whole: Callable[[Sequence[Tensor]], Any]
    forwards: dict[str, Any]
    backwards: dict[str, Any]
    options: dict[str, Any]


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        ctx: Any = args[0]
        problem: _Problem = args[1]
        t: Tensor = args[2]
        tensors: tuple[Tensor, ...] = args[3:]
        y0 = problem.whole(tensors[: problem.parts])
        found = odeint(problem.func, y0, t.detach(), **problem.forwards)
        has_event = problem.forwards["event_fn"] is not None
        event_t, whole = found if has_event else (t.new_zeros(()), found)
        parts = list(each(flatten(whole)[0]))
        ctx.problem, ctx.has_event = problem, has_event
        ctx.adjoint_options = problem.options  # of the solve backwards, for whoever looks
        ctx.save_for_backward(t, event_t, *parts, *tensors[problem.parts :])
        return event_t, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        t, event_t, *saved = ctx.saved_tensors
        ys, params = saved[: problem.parts], saved[problem.parts :]
        times = torch.stack([t[0], event_t]) if ctx.has_event else t
        with torch.no_grad():
            in_t, in_y, in_params = _solve_back(
                problem, times, ys, list(grads[1:]), params, ctx.needs_input_grad[1]
            )
        if in_t is not None and ctx.has_event:
            in_t = torch.cat([in_t[:1], torch.zeros_like(t[1:])])
        return None, in_t, *in_y, *in_params


def _solve_back(
    problem: _Problem,
    t: Tensor,
    ys: list[Tensor],
    grads: list[Tensor],
    params: list[Tensor],
    wants_t: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    n = problem.parts
    augmented = _Augmented(problem, params, wants_t)
    adjoint = [grad[-1] for grad in grads]
    in_params = [torch.zeros_like(p) for p in params]
    in_start = ys[0].new_zeros((), dtype=torch.promote_types(ys[0].dtype, torch.float32))
    in_t = torch.zeros_like(t) if wants_t else None
    for i in range(len(t) - 1, 0, -1):
        if in_t is not None:
            v = list(each(flatten(problem.func(t[i], problem.whole([y[i] for y in ys])))[0]))
            here = sum((dv * grad[i]).sum() for dv, grad in zip(v, grads, strict=True))
            in_t[i], in_start = here, in_start - here
        state = (in_start, *(y[i] for y in ys), *adjoint, *in_params)
        found = odeint(
            augmented, state, t[i - 1 : i + 1].flip(0), options=problem.options, **problem.backwards
        )
        in_start, *rest = (part[1] for part in found)
        adjoint = [a + grad[i - 1] for a, grad in zip(rest[n : 2 * n], grads, strict=True)]
        in_params = rest[2 * n :]
    if in_t is not None:
        in_t[0] = in_start
    return in_t, adjoint, in_params


class _Augmented:
    """The flow of the gradient of t, of y, of its adjoint and of the parameters' gradients."""

    def __init__(self, problem: _Problem, params: list[Tensor], wants_t: bool) -> None:
        self._problem, self._params, self._wants_t = problem, params, wants_t
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            call = getattr(problem.func, f"{name}_adjoint", None)
            if call is not None:
                setattr(self, name, call)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n = self._problem.parts
        with torch.enable_grad():
            time = t.detach().requires_grad_(self._wants_t)
            y = [part.detach().requires_grad_() for part in state[1 : 1 + n]]
            v = list(each(flatten(self._problem.func(time, self._problem.whole(y)))[0]))
            asked = [*([time] if self._wants_t else []), *y, *self._params]
            through = [(dv, a) for dv, a in zip(v, state[1 + n : 1 + 2 * n], strict=True)]
            through = [(dv, -a) for dv, a in through if dv.requires_grad]
            grads: Sequence[Tensor | None] = [None] * len(asked)
            if through:
                grads = torch.autograd.grad(
                    [dv for dv, _ in through],
                    asked,
                    [a for _, a in through],
                    allow_unused=True,
                )
        products = [
            torch.zeros_like(x) if grad is None else grad
            for x, grad in zip(asked, grads, strict=True)
        ]
        in_t = products.pop(0) if self._wants_t else torch.zeros_like(state[0])
        return in_t, *(dv.detach() for dv in v), *products


def _with_norm(
    options: Mapping[str, Any], of_state: Callable[[Any], Any] | None, parts: int, spec: Any
) -> dict[str, Any]:
    """Choose the norm of the solve backwards."""
    found, given = dict(options), options.get("norm")
    if callable(given):
        return found

    def norm(state: tuple[Tensor, ...]) -> Tensor:
        in_t, y, adjoint = state[0], state[1 : 1 + parts], state[1 + parts : 1 + 2 * parts]
        sizes = [in_t.abs(), _size(y, of_state, spec), _size(adjoint, of_state, spec)]
        if given != "seminorm":
            sizes += [_rms(part) for part in state[1 + 2 * parts :]]
        return torch.stack(sizes).max()

    found["norm"] = norm
    return found


def _size(parts: Sequence[Tensor], norm: Callable[[Any], Any] | None, spec: Any) -> Tensor:
    if norm is None:
        return torch.stack([_rms(part) for part in parts]).max()
    return torch.as_tensor(norm(parts[0] if spec is None else unflatten(list(parts), spec)))


def _rms(part: Tensor) -> Tensor:
    return part.square().mean().sqrt()
