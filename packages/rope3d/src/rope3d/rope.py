"""Rope: a rotary layout as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rope3d import extrapolation
from rope3d.angles import exact_cos_sin, spell
from rope3d.rotation import Pairing, Rotation
from rope3d.timed_rope import TimedRope

__all__ = ["Pairing", "Rope"]


@dataclass(frozen=True)
class Rope:
    """A rotary layout as data: one frequency for each axis and each pair of channels.

    angle[token, pair] = sum over axes of position[token, axis] * frequencies[axis][pair]

    An axis that does not turn a pair has frequency 0 there. A pair whose frequencies are all 0
    is left as it is.

    Args:
        frequencies: One row per axis, one number per pair; radians per unit of position.
        base: One number per axis, where frequencies are base^(-exponent); some methods of
            `extrapolate` need it. None where there is no such formula.
        exponents: As `frequencies`; read only where a frequency is not 0.
        pairing: "interleaved" or "half".
        untouched: Channels at the end of a head that belong to no pair (partial rotary).

    Raises:
        ValueError: There is no row, rows differ in length or are empty, a frequency is not
            finite, base and exponents do not give the frequencies, or the pairing is unknown.

    Convention:
        Pair m of n is turned as the complex number `x[a] + i x[b]` by `exp(i angle)`, with
        adjacent channels `(a, b) = (2m, 2m + 1)` if "interleaved" and `(m, m + n)` if "half".

    Source:
        Su et al., RoFormer, arXiv 2104.09864, eq. 34; here with a sum over axes, which contains
        the axis-wise layouts and the mixed one of rope-vit (arXiv 2403.13298).

    >>> Rope(((1.0, 0.0), (0.0, 1.0))).rotation(torch.zeros(5, 2)).cos.shape
    torch.Size([5, 2])
    """

    frequencies: tuple[tuple[float, ...], ...]
    base: tuple[float, ...] | None = None
    exponents: tuple[tuple[float, ...], ...] | None = None
    pairing: Pairing = "interleaved"
    untouched: int = 0
    _spelled: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the rows form a matrix of finite numbers that the formula gives."""
        widths = [len(row) for row in self.frequencies]
        if not widths or min(widths) == 0 or len(set(widths)) > 1:
            raise ValueError(
                f"frequencies have rows of lengths {widths}; expected at least one row, all of the "
                "same length >= 1; give one row per axis with 0.0 where an axis turns no pair"
            )
        if not all(math.isfinite(value) for row in self.frequencies for value in row):
            raise ValueError("frequencies hold a value that is not finite; remove inf and nan")
        if self.pairing not in ("interleaved", "half") or self.untouched < 0:
            raise ValueError(
                f"pairing is {self.pairing!r} and untouched {self.untouched}; "
                "expected 'interleaved' or 'half', and a number of channels >= 0"
            )
        self._check_formula()
        object.__setattr__(self, "_spelled", spell(self.frequencies))

    @property
    def axes(self) -> int:
        """How many columns the positions must have."""
        return len(self.frequencies)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return 2 * len(self.frequencies[0]) + self.untouched

    @property
    def turned(self) -> int:
        """Channels of a head that some axis turns."""
        return 2 * sum(any(column) for column in zip(*self.frequencies, strict=True))

    def on_axes(self, columns: int, axes: Sequence[int]) -> Rope:
        """Read the axes of this layout from chosen columns of wider positions.

        Args:
            columns: How many columns the positions have.
            axes: For each axis of this layout, the column that holds it.

        Returns:
            The same rotation as a layout of `columns` axes; the other columns turn nothing.

        Raises:
            ValueError: `axes` does not name one column in `[0, columns)` per axis, or names one
                twice.

        >>> import rope3d
        >>> rope3d.lumina(72).on_axes(3, (1, 2)).axes
        3
        """
        if len(axes) != self.axes or len(set(axes)) != len(axes):
            raise ValueError(
                f"axes are {tuple(axes)}; expected {self.axes} different columns, "
                "one for each axis of this layout"
            )
        if not all(0 <= axis < columns for axis in axes):
            raise ValueError(
                f"axes are {tuple(axes)}; expected each in [0, {columns}); "
                "raise `columns` or lower the axis"
            )
        source = {column: axis for axis, column in enumerate(axes)}
        still = (0.0,) * len(self.frequencies[0])

        def spread(rows: extrapolation.Rows) -> extrapolation.Rows:
            return tuple(rows[source[c]] if c in source else still for c in range(columns))

        if self.base is None or self.exponents is None:
            return replace(self, frequencies=spread(self.frequencies))
        base = tuple(self.base[source[c]] if c in source else 1.0 for c in range(columns))
        return replace(
            self, frequencies=spread(self.frequencies), base=base, exponents=spread(self.exponents)
        )

    def partial(self, head_dim: int) -> Rope:
        """Turn the first channels of wider heads only (partial rotary).

        Args:
            head_dim: Channels of a head; those beyond the ones of this layout are left alone.

        Returns:
            The same rotation as a layout of `head_dim` channels.

        Raises:
            ValueError: `head_dim` is smaller than that of this layout.

        >>> import rope3d
        >>> rope3d.axial((32,), pairing="half").partial(80).head_dim
        80
        """
        if head_dim < self.head_dim:
            raise ValueError(
                f"head_dim is {head_dim}; expected at least the {self.head_dim} of this layout"
            )
        return replace(self, untouched=self.untouched + head_dim - self.head_dim)

    def extrapolate(
        self,
        method: str,
        *,
        scale: float | Sequence[float],
        trained: float | Sequence[float] | None = None,
        watershed: float = 0.3,
        ramp: tuple[float, float] = (1.0, 32.0),
        k: int | Sequence[int] | None = None,
    ) -> Rope | TimedRope:
        """Fit the layout to more positions than the model was trained at, without training.

        With s the scale of an axis, L its trained length, theta = base^(-e):

        | method | frequency |
        |---|---|
        | "extrapolation" | theta |
        | "interpolation" | theta / s |
        | "ntk" | (base s)^(-e) |
        | "frequency-aware" | max((base s^p)^(-e), theta / s), p = 1 / log_base(L / 2 pi) |
        | "time-aware" | max((base s^p)^(-e), theta / s), p = d / ((d - 1) t + 1) |
        | "time-aware-watershed" | theta / s for t < watershed, else (base s)^(-e) |
        | "yarn" | theta ((1 - g) / s + g), g = (L theta / 2 pi - low) / (high - low) in [0, 1] |
        | "riflex" | theta, but min(theta, 0.9 * 2 pi / (s L)) for the intrinsic pair k |

        Args:
            method: One of the names above.
            scale: Target length / trained length, at least 1; one number, or one per axis.
            trained: Trained length in positions, one number or one per axis; for
                "frequency-aware", "yarn" and "riflex".
            watershed: For "time-aware-watershed": where it switches.
            ramp: For "yarn": (low, high) turns within the trained length; pairs with fewer turns
                are interpolated, pairs with more are kept.
            k: For "riflex": the intrinsic pair among the pairs of an axis, counted from 1; one
                number, or one per axis. None takes the pair whose wavelength is nearest to the
                trained length.

        Returns:
            A layout to use like this one. The two time-aware methods give a `TimedRope`, whose
            `rotation` needs the timestep; the others a `Rope`, whose `rotation` ignores it.

        Raises:
            ValueError: The method is unknown, needs the base of a layout that knows none, or a
                number does not fit it.

        Convention:
            Axes of scale 1 stay as they are: `scale=(2.0, 1.0, 1.0)` treats the first axis only.
            t = 0 is noise, t = 1 is data.

        Source:
            Lumina-Next, arXiv 2406.18583 (its table prints theta * s for interpolation; its code
            divides). YaRN, arXiv 2309.00071, NTK-by-parts with the ramp over turns as printed;
            its released code ramps over channel indices; `yarn_scale` is its temperature.
            RIFLEx, arXiv 2502.15894; it only ever lowers the frequency here.

        >>> import rope3d
        >>> rope3d.axial((4,)).extrapolate("ntk", scale=4.0).frequencies
        ((1.0, 0.005),)
        """
        extrapolation.check(method, self.base is not None)
        scales = extrapolation.per_axis("scale", scale, self.axes)
        if min(scales) < 1.0:
            raise ValueError(
                f"scale is {scale}; expected at least 1: an axis shorter than in training needs "
                "no extrapolation, give it max(1, target / trained)"
            )
        if method in ("frequency-aware", "yarn", "riflex") and trained is None:
            raise ValueError(f"method {method!r} needs trained=, the trained length of each axis")
        if isinstance(k, Sequence) and len(k) != self.axes:
            raise ValueError(f"k is {k}; expected one number, or {self.axes}, one an axis")
        if not 0.0 <= ramp[0] < ramp[1]:
            raise ValueError(f"ramp is {ramp}; expected 0 <= low < high, in turns")
        if method == "time-aware" or method == "time-aware-watershed":
            return TimedRope(self, method, scales, watershed)
        if method == "extrapolation" or max(scales) == 1.0:
            return self
        if method == "ntk" and self.base is not None and self.exponents is not None:
            base = tuple(b * s for b, s in zip(self.base, scales, strict=True))
            return replace(
                self, frequencies=_powers(self.frequencies, base, self.exponents), base=base
            )
        frequencies = extrapolation.scaled(
            method,
            self.frequencies,
            self.base or (),
            self.exponents or (),
            scales,
            extrapolation.per_axis("trained", 1.0 if trained is None else trained, self.axes),
            ramp,
            (k,) * self.axes if isinstance(k, int) else k,
        )
        return replace(self, frequencies=frequencies, base=None, exponents=None)

    def frequencies_at(self, t: Tensor | float | None = None) -> Tensor:
        """Give the frequencies as a tensor.

        Args:
            t: Ignored; `TimedRope` needs it.

        Returns:
            `[axes, pairs]`, float64.
        """
        return torch.tensor(self.frequencies, dtype=torch.float64)

    def rotation(self, positions: Tensor, t: Tensor | float | None = None) -> Rotation:
        """Turn positions into the cosine and sine of each pair's angle.

        Nothing is read back from the device. Angles are computed in float64, or on MPS, which
        has none, in turns (see `turns`), so that they stay exact at large positions.

        Args:
            positions: `[..., tokens, axes]`, any real dtype; fractions are allowed.
            t: Ignored, so that a caller need not know whether a layout follows the timestep.

        Returns:
            The rotation, `[..., tokens, pairs]`.

        Raises:
            ValueError: `positions` does not end in `[tokens, axes]`.

        >>> import rope3d
        >>> rope3d.lumina(8).rotation(torch.zeros(5, 2)).cos.shape
        torch.Size([5, 4])
        """
        self.check_positions(positions)
        cos, sin = exact_cos_sin(positions, self._spelled, self.frequencies)
        return Rotation(cos, sin, self.pairing, self.untouched)

    def check_positions(self, positions: Tensor) -> None:
        """Refuse positions that do not end in `[tokens, axes]`.

        Args:
            positions: Any tensor.

        Raises:
            ValueError: The shape does not fit.
        """
        if positions.ndim < 2 or positions.shape[-1] != self.axes:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}; expected "
                f"[..., tokens, {self.axes}]; for wider positions choose columns with `on_axes`"
            )

    def _check_formula(self) -> None:
        if self.base is None and self.exponents is None:
            return
        if self.base is None or self.exponents is None:
            raise ValueError("base and exponents belong together; give both or neither")
        shape = [len(row) for row in self.exponents]
        if len(self.base) != self.axes or shape != [len(row) for row in self.frequencies]:
            raise ValueError(
                f"there are {len(self.base)} bases and exponents of lengths {shape}; expected one "
                f"base for each of {self.axes} axes, and as many exponents as frequencies"
            )
        expected = _powers(self.frequencies, self.base, self.exponents)
        if not all(
            math.isclose(a, b, rel_tol=1e-9)
            for row, other in zip(self.frequencies, expected, strict=True)
            for a, b in zip(row, other, strict=True)
        ):
            raise ValueError("frequencies are not base ** -exponents; correct one of them")


def _powers(
    frequencies: extrapolation.Rows, base: Sequence[float], exponents: extrapolation.Rows
) -> extrapolation.Rows:
    """Compute base ** -exponent where a frequency is not 0."""
    return tuple(
        tuple(b**-e if theta else 0.0 for theta, e in zip(row, powers, strict=True))
        for row, b, powers in zip(frequencies, base, exponents, strict=True)
    )
