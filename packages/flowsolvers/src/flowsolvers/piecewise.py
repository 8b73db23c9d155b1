"""A time grid given as numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from flowsolvers.warps import Schedule, number

__all__ = ["from_times"]


@dataclass(frozen=True)
class _MonotoneCubic:
    """Hermite cubics through times at even u; harmonic means as slopes keep it increasing."""

    times: tuple[float, ...]

    def slopes(self) -> tuple[float, ...]:
        steps = len(self.times) - 1
        rises = [(b - a) * steps for a, b in pairwise(self.times)]
        if steps == 1:
            return rises[0], rises[0]
        inner = [2 * a * b / (a + b) for a, b in pairwise(rises)]
        first, last = 1.5 * rises[0] - 0.5 * rises[1], 1.5 * rises[-1] - 0.5 * rises[-2]
        return (max(first, 0.0), *inner, max(last, 0.0))

    def piece(self, u: float) -> tuple[int, float]:
        """Which piece u lies in, and where in it."""
        steps = len(self.times) - 1
        place = u * steps
        if abs(place - round(place)) < 1e-12 * steps:
            place = float(round(place))  # i / steps · steps may miss i by rounding
        i = min(int(place), steps - 1)
        return i, place - i

    def __call__(self, u: float) -> float:
        i, z = self.piece(u)
        a, b = self.times[i : i + 2]
        if z in (0.0, 1.0):
            return b if z else a
        da, db = (slope / (len(self.times) - 1) for slope in self.slopes()[i : i + 2])
        rise = z * z * (3 - 2 * z)
        return a + rise * (b - a) + z * (1 - z) * ((1 - z) * da - z * db)

    def slope(self, u: float) -> float:
        i, z = self.piece(u)
        a, b = self.times[i : i + 2]
        da, db = self.slopes()[i : i + 2]
        rise = 6 * z * (1 - z) * (b - a) * (len(self.times) - 1)
        return rise + (1 - z) * (1 - 3 * z) * da + z * (3 * z - 2) * db


def from_times(times: Iterable[float]) -> Schedule:
    """Make a schedule of a grid that is given as numbers.

    Args:
        times: From exactly 0 to exactly 1, strictly increasing, at least two.

    Returns:
        The schedule `times:0,...,1`. Its grid of as many steps is the given times; at other
        numbers of steps a monotone cubic runs through them.

    Raises:
        ValueError: The times are fewer than two, do not run from 0 to 1, or do not increase.

    Source: Fritsch & Butland, A Method for Constructing Local Monotone Piecewise Cubic
        Interpolants, SIAM J. Sci. Stat. Comput. 5, 1984: slopes are harmonic means.

    Example:
        >>> from_times([0, 0.2, 0.5, 1]).grid(3)
        (0.0, 0.2, 0.5, 1.0)
        >>> round(from_times([0, 0.2, 0.5, 1])(0.5), 4)
        0.3331
    """
    given = tuple(float(t) for t in times)
    if len(given) < 2 or given[0] != 0.0 or given[-1] != 1.0:
        raise ValueError(
            f"times must run from 0 to 1, got {len(given)}: {given[:1]} to {given[-1:]}; rescale "
            f"them, and put the end 1.0 last"
        )
    for i, (t, t_next) in enumerate(pairwise(given)):
        if not t < t_next:
            raise ValueError(
                f"times must increase strictly, but times {i} and {i + 1} are {t!r} and {t_next!r}"
            )
    return Schedule("times:" + ",".join(map(number, given)), _MonotoneCubic(given))
