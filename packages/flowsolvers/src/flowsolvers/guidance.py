"""Guidance: functions from velocities to a velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from flowsolvers.context import Context, evaluate, jumps, model_rows
from flowsolvers.rules import Rule, guidance_rule
from flowsolvers.velocity import Velocity

__all__ = ["Channels", "Guided", "Scale", "composed", "guided", "guided_batch"]

#: A number; a tensor that broadcasts with the velocity, such as `[B, 1, 1, 1]`; or a function of t.
Scale: TypeAlias = "float | Tensor | Callable[[float], float]"

#: Which channels are guided: one, a slice, or several.
Channels: TypeAlias = "int | slice | Sequence[int]"

#: c and u of one evaluation.
_Pair: TypeAlias = Callable[[Tensor, Tensor, Context | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Guided:
    """A guided velocity; `guided` and `guided_batch` make it.

    Args:
        cond: What is evaluated alone outside the interval.
        pair: Evaluates the conditional velocity and the other one.
        scale: As for `guided`.
        interval: As for `guided`.
        rule: Combines the pair.
        channels: As for `guided`.
        dim: As for `guided`.
        zero_until: As for `guided`.
        pair_rows: Counts the model rows of a pair.

    Example:
        >>> from flowsolvers import guided
        >>> guided(lambda t, x: x, lambda t, x: -x, interval=(0.1, 0.9)).rows()
        2
    """

    cond: Velocity
    pair: _Pair
    scale: Scale
    interval: tuple[float, float]
    rule: Rule
    channels: Channels | None
    dim: int
    zero_until: float
    pair_rows: Callable[[Context | None], int]
    takes_context: ClassVar[bool] = True

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        """Return dx/dt.

        With a context, what the time rules out is not evaluated. Without one, it is evaluated
        and masked on the device, at the full cost; in neither case does the host wait.
        """
        low, high = self.interval
        if context is not None:
            if context.evaluation == 0:
                getattr(self.rule, "reset", _nothing)()
            if context.t < self.zero_until:
                return torch.zeros_like(x)
            if not context.within(low, high):
                return evaluate(self.cond, t, x, context)
        c, u = self.pair(t, x, context)
        if u.shape != c.shape:
            raise ValueError(
                f"the conditional velocity has shape {tuple(c.shape)}, the unconditional one "
                f"{tuple(u.shape)}; they must be the same"
            )
        v = self._combine(c, u, _at(self.scale, t, context), context)
        if context is None and (low, high) != (0.0, 1.0):
            v = torch.where((t >= low) & (t <= high), v, c.to(v.dtype))
        if context is None and self.zero_until:
            v = torch.where(t < self.zero_until, torch.zeros_like(v), v)
        return v

    def rows(self, context: Context | None = None) -> int:
        """Count how often this evaluation sends the state's rows through a model."""
        if context is not None:
            if context.t < self.zero_until:
                return 0
            if not context.within(*self.interval):
                return model_rows(self.cond, context)
        return self.pair_rows(context)

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which the velocity jumps: `solve` puts steps' ends there and starts anew."""
        return (*self.interval, self.zero_until, *jumps(self.cond))

    def _combine(
        self, c: Tensor, u: Tensor, scale: float | Tensor, context: Context | None
    ) -> Tensor:
        if self.channels is None:
            return self.rule(c, u, scale, context)
        if not -c.ndim <= self.dim < c.ndim:
            raise ValueError(f"dim={self.dim} is not one of the {c.ndim} dimensions of a velocity")
        runs = _runs(self.channels, c.shape[self.dim])
        guided_part = self.rule(_pick(c, runs, self.dim), _pick(u, runs, self.dim), scale, context)
        v, done = c.to(guided_part.dtype, copy=True), 0
        for start, length in runs:
            part = guided_part.narrow(self.dim, done, length)
            v.narrow(self.dim, start, length).copy_(part)
            done += length
        return v


def guided(
    cond: Velocity,
    uncond: Velocity,
    *,
    scale: Scale = 4.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rule: str | Rule = "cfg",
    channels: Channels | None = None,
    dim: int = 1,
    zero_until: float = 0.0,
) -> Guided:
    """Guide without a classifier, v = u + s·(c - u), or by another rule.

    Args:
        cond: Velocity c under the condition.
        uncond: Velocity u without it, or under a negative one, or of a weaker model
            (autoguidance).
        scale: s, finite; 0 is `uncond`, 1 is `cond`, above 1 exaggerates the condition. A tensor
            gives each sample its own, and is not checked. A function of t is given the context's
            t, or without a context the tensor t.
        interval: First and last time of guidance, 0 <= first < last <= 1; outside, v = c. It is
            in time, not in steps, so that it means the same for every solver. (0, 0.25) is
            Lumina-2's truncation.
        rule: `cfg`, `cfg-zero*`, `apg`, `renorm`, `renorm-clip`, or a function
            `rule(c, u, scale, context) -> v` such as `APG(eta=0.1)`.
        channels: Guide these along `dim` only, the others being c's: an index, a slice or several
            indices. Lumina-Next guides `slice(0, 3)` of its 4. None guides all.
        dim: Dimension of the channels.
        zero_until: Before this time v = 0, and no model is called; in [0, 1). CFG-Zero* stands
            still for the first 4 % of the steps.

    Returns:
        A velocity that calls `uncond`, then `cond`, once each. `Solution.nfe` counts the pair
        as one evaluation; `rows(context)` is how often the rows of x went through a model.

    Raises:
        ValueError: The scale is not finite, the interval is not ascending in [0, 1], the rule is
            unknown, `zero_until` is outside [0, 1); or, when called, c and u differ in shape,
            or a channel is out of range.

    Convention: Both ends of the interval are inside, but for steps that lead away from them. What
        is outside is not evaluated if the solver passes a `Context`; without one both velocities
        are, and v is chosen on the device. Edges between 0 and 1 are `jumps`, at which `solve`
        ends a step.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598, with the scale
        counted from the unconditional velocity (their w is s - 1). Interval: Kynkäänniemi et
        al., arXiv 2404.07724. Weaker model: Karras et al., arXiv 2406.02507.

    Example:
        >>> import torch
        >>> v = guided(lambda t, x: 3 * x, lambda t, x: x, scale=4.0)
        >>> v(torch.tensor(0.5), torch.ones(2))
        tensor([9., 9.])
    """

    def pair(t: Tensor, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        u = evaluate(uncond, t, x, context)
        return evaluate(cond, t, x, context), u

    def rows(context: Context | None) -> int:
        return model_rows(cond, context) + model_rows(uncond, context)

    made = _rule(rule)
    _check(scale, interval, zero_until)
    return Guided(cond, pair, scale, interval, made, channels, dim, zero_until, rows)


def guided_batch(
    velocity: Velocity,
    *,
    scale: Scale = 4.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rule: str | Rule = "cfg",
    channels: Channels | None = None,
    dim: int = 1,
    zero_until: float = 0.0,
    cond: Velocity | None = None,
) -> Guided:
    """Guide with one model call on a doubled batch.

    Args:
        velocity: Takes x twice, `[2B, ...]`: the first half under the condition, the second
            without it, as in Lumina.
        scale: As for `guided`.
        interval: As for `guided`.
        rule: As for `guided`.
        channels: As for `guided`.
        dim: As for `guided`.
        zero_until: As for `guided`.
        cond: Takes x once, under the condition; it is evaluated alone outside the interval.
            None evaluates the doubled batch there too, at its cost.

    Returns:
        A velocity of x `[B, ...]`.

    Raises:
        ValueError: As for `guided`; or, when called, x has no dimension, or the result does not
            have 2B rows.

    Convention: Rows are [condition, none]. diffusers' pipelines mostly have them the other way.

    Example:
        >>> import torch
        >>> v = guided_batch(lambda t, x: x * torch.tensor([[3.0], [1.0]]), scale=4.0)
        >>> v(torch.tensor(0.5), torch.ones(1, 2))
        tensor([[9., 9.]])
    """

    def pair(t: Tensor, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        if not x.ndim:
            raise ValueError("x has no dimension to double; give it one for the batch")
        both = evaluate(velocity, t, torch.cat([x, x]), context)
        if len(both) != 2 * len(x):
            raise ValueError(
                f"velocity returned {len(both)} rows for {2 * len(x)}; it must return them all"
            )
        c, u = both.chunk(2)
        return c, u

    def first_half(t: Tensor, x: Tensor, context: Context | None = None) -> Tensor:
        return pair(t, x, context)[0]

    def rows(context: Context | None) -> int:
        return 2 * model_rows(velocity, context)

    made = _rule(rule)
    _check(scale, interval, zero_until)
    alone = _Half(first_half, rows, jumps(velocity)) if cond is None else cond
    return Guided(alone, pair, scale, interval, made, channels, dim, zero_until, rows)


@dataclass(frozen=True, eq=False)
class _Half:
    """The conditional half of a doubled batch."""

    first_half: Callable[[Tensor, Tensor, Context | None], Tensor]
    rows: Callable[[Context | None], int]
    jumps: tuple[float, ...]
    takes_context: ClassVar[bool] = True

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        return self.first_half(t, x, context)


@dataclass(frozen=True, eq=False)
class _Composed:
    base: Velocity
    terms: tuple[tuple[Velocity, Scale], ...]
    takes_context: ClassVar[bool] = True

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        u = evaluate(self.base, t, x, context)
        v = u
        for velocity, scale in self.terms:
            v = v + _at(scale, t, context) * (evaluate(velocity, t, x, context) - u)
        return v

    def rows(self, context: Context | None = None) -> int:
        velocities = [self.base, *(velocity for velocity, _ in self.terms)]
        return sum(model_rows(velocity, context) for velocity in velocities)

    @property
    def jumps(self) -> tuple[float, ...]:
        velocities = [self.base, *(velocity for velocity, _ in self.terms)]
        return tuple(t for velocity in velocities for t in jumps(velocity))


def composed(uncond: Velocity, terms: Sequence[tuple[Velocity, Scale]]) -> Velocity:
    """Guide by several conditions at once, v = u + Σ_i s_i·(c_i - u).

    Args:
        uncond: Velocity u without a condition.
        terms: Pairs of a velocity c_i under one condition and its scale s_i, as for `guided`; a
            negative scale avoids the condition.

    Returns:
        A velocity that calls `uncond`, then each c_i, once.

    Raises:
        ValueError: There are no terms, or a scale is not finite.

    Source: Liu et al., Compositional Visual Generation with Composable Diffusion Models, arXiv
        2206.01714.

    Example:
        >>> import torch
        >>> v = composed(lambda t, x: x, [(lambda t, x: 2 * x, 3.0), (lambda t, x: 4 * x, 1.0)])
        >>> v(torch.tensor(0.5), torch.ones(1))
        tensor([7.])
    """
    if not terms:
        raise ValueError("composed needs at least one condition, got none")
    for _, scale in terms:
        _check(scale, (0.0, 1.0), 0.0)
    return _Composed(uncond, tuple(terms))


def _nothing() -> None:
    """Stand in for the reset of a rule that remembers nothing."""


def _rule(rule: str | Rule) -> Rule:
    return guidance_rule(rule) if isinstance(rule, str) else rule


def _check(scale: Scale, interval: tuple[float, float], zero_until: float) -> None:
    if not (callable(scale) or isinstance(scale, Tensor) or math.isfinite(scale)):
        raise ValueError(f"the guidance scale must be finite, got {scale!r}")
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(
            f"the guidance interval must be (first, last) with 0 <= first < last <= 1, in time "
            f"from noise at 0 to data at 1, got {interval!r}"
        )
    if not 0.0 <= zero_until < 1.0:
        raise ValueError(f"zero_until must be in [0, 1), got {zero_until!r}")


def _at(scale: Scale, t: Tensor, context: Context | None) -> float | Tensor:
    if isinstance(scale, Tensor) or not callable(scale):
        return scale
    # Arithmetic on a 0-dim tensor reads like that on a float, and does not wait.
    return scale(cast("float", t) if context is None else context.t)


def _runs(channels: Channels, size: int) -> list[tuple[int, int]]:
    """Write channels as runs of (start, length), which need no index on the device."""
    if isinstance(channels, slice):
        chosen = list(range(size)[channels])
    else:
        chosen = [channels] if isinstance(channels, int) else list(channels)
    if not chosen or not all(-size <= channel < size for channel in chosen):
        raise ValueError(
            f"channels={channels!r} must name at least one of the {size} channels, "
            f"{-size} to {size - 1}"
        )
    runs: list[tuple[int, int]] = []
    for channel in sorted({channel % size for channel in chosen}):
        if runs and sum(runs[-1]) == channel:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((channel, 1))
    return runs


def _pick(v: Tensor, runs: list[tuple[int, int]], dim: int) -> Tensor:
    parts = [v.narrow(dim, start, length) for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
