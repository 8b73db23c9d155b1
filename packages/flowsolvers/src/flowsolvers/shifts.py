"""Time grids that follow the resolution: shifts, and the noise left to the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flowsolvers.warps import Schedule, number

__all__ = ["flux_shift", "sd3_shift", "shift", "terminal"]


@dataclass(frozen=True)
class _Rational:
    sigma: float

    def __call__(self, u: float) -> float:
        return u / (u + self.sigma * (1.0 - u))  # written so that u = 1 gives exactly 1

    def inverse(self, t: float) -> float:
        return self.sigma * t / (self.sigma * t + (1.0 - t))

    def slope(self, u: float) -> float:
        return self.sigma / (u + self.sigma * (1.0 - u)) ** 2


@dataclass(frozen=True)
class _Bend:
    """A line from (0, 0) to (last, 1 - sigma), and one from there to (1, 1)."""

    sigma: float
    last: float

    def __call__(self, u: float) -> float:
        if u <= self.last:
            return u * ((1.0 - self.sigma) / self.last)
        return 1.0 - self.sigma * ((1.0 - u) / (1.0 - self.last))


@dataclass(frozen=True)
class _Terminal:
    sigma: float

    def __call__(self, u: float) -> float:
        raise ValueError(
            f"terminal:{number(self.sigma)} depends on the number of steps, so it has no value at "
            f"u={u!r}; lay out the whole grid with .grid(steps)"
        )

    inverse = slope = __call__

    def settle(self, last: float) -> _Bend:
        return _Bend(self.sigma if last else 0.0, last or 1.0)


def shift(sigma: float) -> Schedule:
    """Shift the steps towards noise, t = u / (s + u - s·u) with s = sigma.

    Args:
        sigma: The factor, greater than 0; 1 is uniform, above 1 the steps near noise are
            short, below 1 those near data. The Lumina-Next demo uses 4.

    Returns:
        The schedule `shift:SIGMA`.

    Raises:
        ValueError: `sigma` is not a finite number greater than 0.

    Convention: the slope dt/du is 1/sigma at noise (t=0) and sigma at data (t=1). It equals the
        shift of SD3 written in noise time 1 - t. `shift(a) @ shift(b)` maps as shift(a·b), and
        the inverse of shift(a) as shift(1/a).

    Source: Lumina-Next, arXiv 2406.18583, rational schedule. The paper prints
        t / (s - t + s·t), which does not end at 1; this is what the released code computes.

    Example:
        >>> shift(4.0)(0.5)
        0.2
    """
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"sigma of shift must be finite and greater than 0, got {sigma!r}")
    return Schedule(f"shift:{number(sigma)}", _Rational(float(sigma)))


def sd3_shift(tokens: int, trained: int) -> Schedule:
    """Shift by the square root of the ratio of sizes, √(m/n).

    Args:
        tokens: m, tokens or pixels of what is sampled, at least 1.
        trained: n, of what the model was trained on, at least 1.

    Returns:
        The schedule `shift:SIGMA`.

    Raises:
        ValueError: A number is less than 1.

    Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis,
        arXiv 2403.03206, eq. 23.

    Example:
        >>> print(sd3_shift(64 * 64, 32 * 32))
        shift:2
    """
    for name, value in (("tokens", tokens), ("trained", trained)):
        if not value >= 1:
            raise ValueError(f"{name} of sd3_shift must be at least 1, got {value!r}")
    return shift(math.sqrt(tokens / trained))


def flux_shift(
    tokens: int,
    *,
    low: tuple[int, float] = (256, 0.5),
    high: tuple[int, float] = (4096, 1.15),
    kind: Literal["exponential", "linear"] = "exponential",
) -> Schedule:
    """Shift by a factor whose logarithm, or which itself, is linear in the number of tokens.

    Args:
        tokens: Of what is sampled, at least 1.
        low: Tokens and μ of one point of the line.
        high: Of the other one; outside, the line goes on.
        kind: `exponential` shifts by e^μ, `linear` by μ, which must then be greater than 0.

    Returns:
        The schedule `shift:SIGMA`.

    Raises:
        ValueError: `tokens` is less than 1, the points have the same number of tokens, `kind` is
            another word, or the factor is not finite and greater than 0.

    Source: FLUX.1 (Black Forest Labs, 2024), sampling.py; Lumina-Image 2.0, arXiv 2503.21758,
        trains and samples with the same points.

    Example:
        >>> round(flux_shift(4096).density(1.0), 4)  # e^1.15
        3.1582
    """
    if not tokens >= 1:
        raise ValueError(f"tokens of flux_shift must be at least 1, got {tokens!r}")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"kind of flux_shift must be 'exponential' or 'linear', got {kind!r}")
    if low[0] == high[0]:
        raise ValueError(f"low and high of flux_shift must differ in tokens, both have {low[0]!r}")
    mu = low[1] + (high[1] - low[1]) * ((tokens - low[0]) / (high[0] - low[0]))
    if kind == "linear" and not mu > 0.0:
        raise ValueError(f"the line gives μ={mu!r} at {tokens!r} tokens; raise low or high")
    return shift(math.exp(mu) if kind == "exponential" else mu)


def terminal(sigma: float) -> Schedule:
    """Leave a given level of noise to the last step.

    Whatever stands to the right is stretched so that the last step starts at t = 1 - sigma:
    t = t_i·(1 - sigma) / t_{N-1} up to there.

    Args:
        sigma: Noise level 1 - t at which the last step starts, in (0, 1). LTX-Video uses 0.1.

    Returns:
        The schedule `terminal:SIGMA`, for the left of another one: `terminal(0.1) @ shift(4.0)`.

    Raises:
        ValueError: `sigma` is outside (0, 1); or the schedule is called, inverted or
            differentiated at one u, since it depends on the number of steps.

    Source: LTX-Video, arXiv 2501.00103, released sampler (`shift_terminal`).

    Example:
        >>> (terminal(0.1) @ shift(4.0)).grid(2)
        (0.0, 0.9, 1.0)
    """
    if not 0.0 < sigma < 1.0:
        raise ValueError(f"sigma of terminal must be in (0, 1), got {sigma!r}")
    return Schedule(f"terminal:{number(sigma)}", _Terminal(float(sigma)))
