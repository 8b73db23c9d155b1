"""Rules of guidance: pure functions from two velocities and a scale to one.

A rule is called as `rule(c, u, scale, context)`. Velocities in half precision are combined in
float32, and so returned. A rule that keeps something from one evaluation to the next has a
method `reset`, which guidance calls at the first evaluation of a solve. Norms and inner
products are taken for each sample, over all dimensions but the first (over the only one, if
there is one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from flowsolvers.context import Context
from flowsolvers.spelling import closest_first

__all__ = ["APG", "Momentum", "Renorm", "Rule", "cfg", "cfg_zero_star", "guidance_rule"]

#: `rule(c, u, scale, context) -> v`: c and u of one shape; scale a number or a tensor that
#: broadcasts with them.
Rule: TypeAlias = Callable[[Tensor, Tensor, "float | Tensor", Context | None], Tensor]


def cfg(c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None = None) -> Tensor:
    """Exaggerate the difference, v = u + s·(c - u).

    Args:
        c: Velocity under the condition.
        u: Velocity without it, of the same shape.
        scale: s.
        context: Not used.

    Returns:
        v, shaped like c.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598, with the scale
        counted from the unconditional velocity (their w is s - 1).

    Example:
        >>> cfg(torch.tensor([3.0]), torch.tensor([1.0]), 4.0)
        tensor([9.])
    """
    del context
    c, u = _wide(c), _wide(u)
    return u + scale * (c - u)


def cfg_zero_star(
    c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None = None
) -> Tensor:
    """Guide from the multiple of u that is nearest to c, v = z·u + s·(c - z·u), z = ⟨c,u⟩/⟨u,u⟩.

    Args:
        c: Velocity under the condition.
        u: Velocity without it, of the same shape.
        scale: s.
        context: Not used.

    Returns:
        v, shaped like c.

    Source: Fan et al., CFG-Zero*, arXiv 2503.18886, the optimised scale. Its other half, no
        motion at the start, is `guided(..., zero_until=0.04)`.

    Example:
        >>> cfg_zero_star(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]), 3.0)
        tensor([[2., 3.]])
    """
    del context
    c, u = _wide(c), _wide(u)
    scaled = u * (_dot(c, u) / _dot(u, u).clamp_min(_TINY))
    return scaled + scale * (c - scaled)


@dataclass(eq=False)
class Momentum:
    """The running sum that APG keeps from one step to the next.

    It starts anew when a context says that the evaluation is the first, be that inside the
    interval of guidance or not; without contexts, call `reset` before each solve. Later stages
    of one step see the sum but do not add to it. It is for solves on a budget: a velocity that
    remembers is no function of time and state, whose error an adaptive solver could estimate.

    Args:
        beta: Weight of the past, in (-1, 1); the paper's is -0.5.

    Raises:
        ValueError: `beta` is out of range; or, when called, the solve is adaptive.

    Example:
        >>> momentum = Momentum(-0.5)
        >>> [momentum(torch.ones(1), None).item() for _ in range(3)]
        [1.0, 0.5, 0.75]
    """

    beta: float = -0.5
    _past: Tensor | None = field(default=None, init=False, repr=False)
    _sum: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Prove that the past fades."""
        if not -1.0 < self.beta < 1.0:
            raise ValueError(f"beta of Momentum must be in (-1, 1), got {self.beta!r}")

    def __call__(self, change: Tensor, context: Context | None) -> Tensor:
        """Add a difference c - u, and return it with the past."""
        if context is not None and context.evaluations is None:
            raise ValueError(
                "a momentum remembers earlier evaluations, among them those of rejected steps; "
                "leave it out of an adaptive solve, or take solve with a budget"
            )
        if context is not None and context.evaluation == 0:
            self.reset()
        later_stage = context is not None and context.stage > 0
        past = self._past if later_stage else self._sum
        total = change if past is None else change + self.beta * past
        if not later_stage:
            self._past, self._sum = past, total
        return total

    def reset(self) -> None:
        """Forget the past."""
        self._past = self._sum = None


@dataclass(frozen=True)
class APG:
    """Guide across the conditional velocity rather than along it, v = c + (s - 1)·(d⊥ + η·d∥).

    d = c - u, with momentum if there is one, then cut to a norm of at most `cap`; d∥ is its part
    along c, d⊥ the rest. At η = 1 without cap and momentum this is `cfg`.

    Args:
        eta: η, what remains of the parallel part, which saturates colours; finite.
        cap: Greatest norm of d for each sample, greater than 0; None is no limit.
        momentum: Keeps state between evaluations; one object serves one solve at a time.

    Raises:
        ValueError: `eta` is not finite, or `cap` is not greater than 0.

    Source: Sadat, Hilliges & Weber, Eliminating Oversaturation and Artifacts of High Guidance
        Scales in Diffusion Models, arXiv 2410.02416, algorithm 1. There c and u predict the
        data; here they are velocities.

    Example:
        >>> c, u = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> APG()(c, u, 3.0)  # of d = (1, -1), only (0, -1) is across c
        tensor([[ 2., -2.]])
    """

    eta: float = 0.0
    cap: float | None = None
    momentum: Momentum | None = None

    def __post_init__(self) -> None:
        """Prove the ranges."""
        if not math.isfinite(self.eta):
            raise ValueError(f"eta of APG must be finite, got {self.eta!r}")
        if self.cap is not None and not self.cap > 0.0:
            raise ValueError(f"cap of APG must be greater than 0, or None, got {self.cap!r}")

    def reset(self) -> None:
        """Forget the past of the momentum, before a new solve."""
        if self.momentum is not None:
            self.momentum.reset()

    def __call__(
        self, c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None = None
    ) -> Tensor:
        """Return v."""
        c, u = _wide(c), _wide(u)
        d = c - u
        if self.momentum is not None:
            d = self.momentum(d, context)
        if self.cap is not None:
            d = d * (self.cap / _dot(d, d).sqrt().clamp_min(_TINY)).clamp_max(1.0)
        along = c * (_dot(d, c) / _dot(c, c).clamp_min(_TINY))
        return c + (scale - 1.0) * (d - along + self.eta * along)


@dataclass(frozen=True)
class Renorm:
    """Classifier-free guidance brought back to the norm of the conditional velocity.

    With g = u + s·(c - u): v = g·k·|c| / |g|, or where `clip` is set, only if that is shorter.

    Args:
        dims: Over which the norms are taken; None is each sample's all.
        factor: k, greater than 0 and finite.
        clip: Shorten g to k·|c| where it is longer, and never lengthen it.

    Raises:
        ValueError: `factor` is out of range.

    Source: Lumina-Image 2.0, arXiv 2503.21758, and its released samplers: the last dimension and
        no clip in diffusers (`renorm`), each sample's all and a clip in the project's own
        (`renorm-clip`).

    Example:
        >>> c, u = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
        >>> Renorm()(c, u, 1.0), Renorm()(torch.zeros(1, 2), u, 1.0)
        (tensor([[3., 4.]]), tensor([[0., 0.]]))
    """

    dims: tuple[int, ...] | None = (-1,)
    factor: float = 1.0
    clip: bool = False

    def __post_init__(self) -> None:
        """Prove the range."""
        if not (math.isfinite(self.factor) and self.factor > 0.0):
            raise ValueError(
                f"factor of Renorm must be finite and greater than 0, got {self.factor!r}"
            )

    def __call__(
        self, c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None = None
    ) -> Tensor:
        """Return v."""
        g = cfg(c, u, scale, context)
        ratio = self.factor * _norm(_wide(c), self.dims) / _norm(g, self.dims).clamp_min(_TINY)
        return g * (ratio.clamp_max(1.0) if self.clip else ratio)


#: Keeps a division by an all-zero velocity finite, in float32 too.
_TINY = 1e-30

_RULES: dict[str, Rule] = {
    "apg": APG(),
    "cfg": cfg,
    "cfg-zero*": cfg_zero_star,
    "renorm": Renorm(),
    "renorm-clip": Renorm(dims=None, clip=True),
}


def guidance_rule(name: str) -> Rule:
    """Find a rule of guidance by name.

    Args:
        name: `cfg`, `cfg-zero*`, `apg`, `renorm` or `renorm-clip`.

    Returns:
        The rule, with its defaults; other settings are `APG(...)` and `Renorm(...)`.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> guidance_rule("renorm")
        Renorm(dims=(-1,), factor=1.0, clip=False)
    """
    if name not in _RULES:
        accepted = ", ".join(closest_first(name, _RULES))
        raise ValueError(f"unknown guidance rule {name!r}; accepted, closest first: {accepted}")
    return _RULES[name]


def _wide(v: Tensor) -> Tensor:
    return v.float() if v.dtype in (torch.bfloat16, torch.float16) else v


def _norm(v: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    return torch.linalg.vector_norm(v, dim=_dims(v) if dims is None else dims, keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(_dims(a), keepdim=True)


def _dims(v: Tensor) -> tuple[int, ...]:
    return tuple(range(1, v.ndim)) if v.ndim > 1 else tuple(range(v.ndim))
