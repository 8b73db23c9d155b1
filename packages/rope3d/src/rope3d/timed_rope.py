"""Layouts whose frequencies follow the timestep of a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rope3d.angles import cos_sin, matrix, real_dtype, spell, turn_cos_sin
from rope3d.double_float import Pair, add, constant, divide, exact_product, exp2, multiply, split
from rope3d.rotation import Pairing, Rotation

if TYPE_CHECKING:
    from rope3d.rope import Rope

__all__ = ["TimedRope"]


@dataclass(frozen=True)
class TimedRope:
    """A layout extrapolated differently at each timestep; made by `Rope.extrapolate`.

    theta'(t) = theta * scale^(-share(t)),  theta = base^(-e)

    "time-aware":            share = min(e * d / d_t, 1),  d_t = (d - 1) t + 1
    "time-aware-watershed":  share = 1 if t < watershed else e

    d counts the channels that turn. The timestep is a tensor: nothing is rebuilt, recompiled or
    remembered between timesteps, and each sample may have its own.

    Args:
        rope: The trained layout; it knows its base and exponents.
        method: The schedule, by name.
        scale: Target length / trained length, one per axis, at least 1.
        watershed: Where "time-aware-watershed" switches.

    Raises:
        ValueError: `rope` does not know its exponents, the method is not one of these two, or
            `scale` does not hold one number >= 1 per axis.

    Convention:
        t = 0 is noise and t = 1 is data. Early steps interpolate positions (global structure),
        late ones change the base (detail). A pair of exponent 0, such as the first of `lumina`
        and `axial`, keeps its frequency for t of "time-aware" and above the watershed.

    Source:
        Lumina-Next, arXiv 2406.18583, time-aware scaled RoPE; written there as
        max((base * s^(d / d_t))^(-e), theta / s), which overflows at t = 0. The switch is what
        Alpha-VLLM/Lumina-T2X released.
    """

    rope: Rope
    method: Literal["time-aware", "time-aware-watershed"]
    scale: tuple[float, ...]
    watershed: float = 0.3
    _shrink: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _least: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)
    _slope: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)
    _edge: tuple[float, float] = field(init=False, repr=False, compare=False)
    _spelled: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take logarithms once, and spell the numbers for torch.compile."""
        rows = (*self.rope.frequencies, *self._exponents)
        if self.method not in ("time-aware", "time-aware-watershed"):
            raise ValueError(
                f"method is {self.method!r}; expected 'time-aware' or 'time-aware-watershed'; "
                "`Rope.extrapolate` offers the others"
            )
        if len(self.scale) != self.axes or not all(1.0 <= s < math.inf for s in self.scale):
            raise ValueError(f"scale is {self.scale}; expected {self.axes} numbers >= 1")
        object.__setattr__(self, "_shrink", tuple(-math.log(s) for s in self.scale))
        # For float32: the power of two at share 1, and how it grows with e / 2 pi, as tables are
        # kept in turns.
        least = [-math.log2(s) for s in self.scale]
        turn = 2 * math.pi * (self.rope.turned if self.method == "time-aware" else 1)
        object.__setattr__(self, "_least", tuple(split(power) for power in least))
        object.__setattr__(self, "_slope", tuple(split(turn * power) for power in least))
        object.__setattr__(self, "_edge", split(self.watershed))
        object.__setattr__(self, "_spelled", spell(rows))

    @property
    def axes(self) -> int:
        """How many columns the positions must have."""
        return self.rope.axes

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.rope.head_dim

    @property
    def pairing(self) -> Pairing:
        """Which channels form a pair."""
        return self.rope.pairing

    def on_axes(self, columns: int, axes: Sequence[int]) -> TimedRope:
        """Read the axes from chosen columns of wider positions, as `Rope.on_axes`."""
        rope = self.rope.on_axes(columns, axes)
        scales = dict(zip(axes, self.scale, strict=True))
        scale = tuple(scales.get(column, 1.0) for column in range(columns))
        return TimedRope(rope, self.method, scale, self.watershed)

    def partial(self, head_dim: int) -> TimedRope:
        """Turn the first channels of wider heads only, as `Rope.partial`."""
        return TimedRope(self.rope.partial(head_dim), self.method, self.scale, self.watershed)

    def frequencies_at(self, t: Tensor | float | None = None) -> Tensor:
        """Compute the frequencies at given timesteps.

        Args:
            t: Timesteps in [0, 1], any shape; values outside are taken as the nearest end.

        Returns:
            `[*t.shape, axes, pairs]`, float64.

        Raises:
            ValueError: There is no timestep.
        """
        t = torch.as_tensor(self._require(t))
        return torch.stack(self._rows(t.unsqueeze(-1)), dim=-2)

    def rotation(self, positions: Tensor, t: Tensor | float | None = None) -> Rotation:
        """Turn positions into the cosine and sine of each pair's angle at each timestep.

        Computed in float64; on MPS, which has none, in double-float arithmetic and in turns.
        Either way cosine and sine are within 1e-6 of the exact ones up to position 1e6.

        Args:
            positions: `[..., tokens, axes]`, any real dtype.
            t: Timesteps in [0, 1]. One for all; or one per sample, of shape
                `positions.shape[:-2]`; or one per token, of shape `positions.shape[:-1]`, as
                packed samples need it. Sizes of 1 repeat: a dense batch that shares its
                positions gives `[1, tokens, axes]` and t `[batch]`.

        Returns:
            The rotation, `[..., tokens, pairs]`.

        Raises:
            ValueError: There is no timestep, or the shapes do not fit.

        >>> import rope3d
        >>> rope = rope3d.paper(12).extrapolate("time-aware", scale=2.0)
        >>> positions = rope3d.grid(frames=1, height=2, width=3)
        >>> rope.rotation(positions[None], torch.tensor([0.0, 0.4, 1.0])).cos.shape
        torch.Size([3, 6, 6])
        """
        self.rope.check_positions(positions)
        t = torch.as_tensor(self._require(t), device=positions.device)
        if t.ndim and t.ndim not in (positions.ndim - 1, positions.ndim - 2):
            raise ValueError(
                f"t has shape {tuple(t.shape)} and positions {tuple(positions.shape)}; expected "
                "one timestep per sample, positions.shape[:-2], or per token, "
                "positions.shape[:-1]; give positions [1, tokens, axes] if the samples share them"
            )
        if t.ndim == positions.ndim - 1:
            tokens = positions.shape[-2]
            if t.shape[-1] != tokens:
                raise ValueError(
                    f"t has shape {tuple(t.shape)}, but there are {tokens} tokens; expected one "
                    "timestep per token; for a batch that shares its positions give them as "
                    "[1, tokens, axes]"
                )
            t = t.unsqueeze(-1)
        elif t.ndim:
            t = t[..., None, None]
        if real_dtype(positions.device) == torch.float64:
            cos, sin = cos_sin(positions, self._rows(t))
        else:
            high, low = self._turn_rows(t)
            cos, sin = turn_cos_sin(positions, high.unbind(-2), low.unbind(-2))
        return Rotation(cos, sin, self.pairing, self.rope.untouched)

    def _rows(self, t: Tensor) -> list[Tensor]:
        """Frequencies of each axis, `[..., pairs]`, at t `[..., 1]`."""
        dtype = real_dtype(t.device)
        rows = (*self.rope.frequencies, *self._exponents)
        theta, e = matrix(self._spelled, rows, dtype, t).chunk(2)
        t = t.to(dtype)
        if self.method == "time-aware":
            d = self.rope.turned
            share = e * (d / ((d - 1) * t.clamp(0.0, 1.0).unsqueeze(-1) + 1.0))
            share = share.clamp(max=1.0)
        else:
            share = torch.where(t.unsqueeze(-1) < self.watershed, torch.ones_like(e), e)
        return [
            theta[axis] * (share[..., axis, :] * self._shrink[axis]).exp()
            for axis in range(self.axes)
        ]

    def _turn_rows(self, t: Tensor) -> Pair:
        """Frequencies in turns, `[..., axes, pairs]`, at t `[..., 1]`, as double-floats."""
        rows = (*self.rope.frequencies, *self._exponents)
        high, low = matrix(self._spelled, rows, None, t).chunk(2)
        theta, e = (high[: self.axes], low[: self.axes]), (high[self.axes :], low[self.axes :])
        t = t.to(torch.float32).unsqueeze(-1)
        least, power = _column(self._least, t), multiply(e, _column(self._slope, t))
        if self.method == "time-aware":
            growth = exact_product(t.clamp(0.0, 1.0), torch.full_like(t, self.rope.turned - 1))
            power = divide(power, add(constant((1.0, 0.0), t), growth))
            interpolates = (power[0] - least[0]) + (power[1] - least[1]) < 0
        else:
            edge, rest = self._edge
            interpolates = t - edge < rest
        high, low = (torch.where(interpolates, *part) for part in zip(least, power, strict=True))
        return multiply(theta, exp2((high, low)))

    @property
    def _exponents(self) -> tuple[tuple[float, ...], ...]:
        if self.rope.exponents is None:
            raise ValueError("the layout knows no exponents; build it with a named layout")
        return self.rope.exponents

    def _require(self, t: Tensor | float | None) -> Tensor | float:
        if t is None:
            raise ValueError(
                f"method {self.method!r} depends on the timestep; give t in [0, 1], 0 = noise"
            )
        return t


def _column(parts: Sequence[tuple[float, float]], like: Tensor) -> Pair:
    """Write one number per axis as `[axes, 1]`, from what `split` gave."""
    zero = torch.zeros(1, dtype=torch.float32, device=like.device)
    high, low = zip(*parts, strict=True)
    return torch.stack([zero + part for part in high]), torch.stack([zero + part for part in low])
