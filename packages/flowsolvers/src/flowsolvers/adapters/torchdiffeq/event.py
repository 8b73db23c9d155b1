"""An event whose time and state have gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowsolvers.adapters.torchdiffeq.integrate import combined, odeint
from flowsolvers.flowing import Flowing
from flowsolvers.states import each, flatten, unflatten

__all__ = ["odeint_event"]


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Integrate until an event; gradients flow to its time by the implicit function theorem.

    Where event(t, y(t)) = 0, a change of y moves t by -∂event·dy / (d event/dt), and the state
    with it by the velocity.

    Args:
        func: As for `odeint`.
        y0: The state at t0.
        t0: 0-dim, or one number.
        event_fn: As for `odeint`.
        reverse_time: Whether to go backwards.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: For the interface.

    Returns:
        The time of the event, and the states at t0 and there, `[2, ...]`.

    Example:
        >>> height = torch.tensor(4.905, requires_grad=True)
        >>> y0 = torch.stack([height, torch.zeros(())])
        >>> fall = lambda t, y: torch.stack([y[1], torch.tensor(-9.81)])
        >>> t, y = odeint_event(fall, y0, torch.tensor(0.0), event_fn=lambda t, y: y[0])
        >>> t, torch.autograd.grad(t, height)[0]  # √(2h/g), of slope t/(2h)
        (tensor(1.0000, grad_fn=<AddBackward0>), tensor(0.1019))
    """
    start = t0.reshape(-1)
    toward = start.detach() + (-1.0 if reverse_time else 1.0)
    t = torch.cat([start, toward])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    leaves, spec = flatten(solution)
    stacks = list(each(leaves))
    flow = Flowing(func, y0, per_sample=False)
    first = [stack[0].detach().to(flow.dtype) for stack in stacks]
    last = [stack[1].to(flow.dtype) for stack in stacks]
    event = combined(event_fn, flow, float(t0), first)

    time = event_t.detach().to(flow.dtype).requires_grad_()
    y = [part.detach().requires_grad_() for part in last]
    with torch.enable_grad():
        value = event(time, flow.whole(y))
    slopes = torch.autograd.grad(value, [time, *y], allow_unused=True)
    with torch.no_grad():
        v = flow(float(event_t), [part.detach() for part in last])
    rate = sum(
        (slope * dy).sum()
        for slope, dy in zip(slopes, [torch.ones_like(time), *v], strict=True)
        if slope is not None
    )
    there = event(time.detach(), flow.whole(last))
    shift = (there.detach() - there) / torch.as_tensor(rate)
    moved = [
        torch.stack([stack[0], (part + shift * dy).to(stack.dtype)])
        for stack, part, dy in zip(stacks, last, v, strict=True)
    ]
    whole = moved[0] if spec is None else unflatten(moved, spec)
    return event_t + shift.to(event_t.dtype), whole
