"""Context extrapolation: how fast the pairs turn beyond the length that a model was trained at.

With s = target / trained length, interpolation and the methods that change the base divide a
frequency by a part of the scale:

    theta' = theta * s^(-share),  share in [0, 1]

Share 0 keeps the frequency and share 1 is position interpolation. With theta = base^(-e),
multiplying the base by s^p is a share of p * e, and the maximum with theta / s is the limit 1;
nothing overflows in this form. "yarn" blends the two ends instead, and "riflex" moves one pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ["METHODS", "RIFLEX_MARGIN", "TIMED", "Rows", "check", "per_axis", "scaled", "yarn_scale"]

Rows = tuple[tuple[float, ...], ...]

#: Methods whose frequencies depend on the timestep.
TIMED = ("time-aware", "time-aware-watershed")

#: All methods by name.
METHODS = ("extrapolation", "interpolation", "ntk", "frequency-aware", *TIMED, "yarn", "riflex")

#: RIFLEx keeps the target length below this part of the intrinsic period.
RIFLEX_MARGIN = 0.9


def check(method: str, formula: bool) -> None:
    """Refuse unknown methods, and methods that need a base where none is known.

    Args:
        method: A name in `METHODS`.
        formula: Whether base and exponents of the layout are known.

    Raises:
        ValueError: The method is unknown, or needs the base of a layout that has none.
    """
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=len(METHODS), cutoff=0.0)
        raise ValueError(f"unknown method {method!r}; expected one of: {', '.join(near)}")
    if not formula and method in ("ntk", "frequency-aware", *TIMED):
        raise ValueError(
            f"method {method!r} changes the base, but this layout knows only its frequencies; "
            "build it with a named layout such as `axial`, give Rope its base and exponents, or "
            "use 'interpolation', 'yarn' or 'riflex'"
        )


def per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """Repeat one number for every axis, or check that there is one per axis.

    Args:
        name: What the numbers are, for the message.
        value: One number, or one per axis.
        axes: How many axes there are.

    Returns:
        One number per axis.

    Raises:
        ValueError: Their count is wrong, or a number is not finite and positive.

    >>> per_axis("scale", 2, 3)
    (2.0, 2.0, 2.0)
    """
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * axes
    if len(values) != axes or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"{name} is {value}; expected one positive number, or {axes}, one an axis")
    return values


def scaled(
    method: str,
    frequencies: Rows,
    base: Sequence[float],
    exponents: Rows,
    scale: Sequence[float],
    trained: Sequence[float],
    ramp: tuple[float, float],
    k: Sequence[int] | None,
) -> Rows:
    """Compute the frequencies of a method that does not depend on the timestep.

    Args:
        method: A name in `METHODS`, not in `TIMED`.
        frequencies: `[axes][pairs]`, 0 where an axis does not turn a pair.
        base: One per axis, for "frequency-aware".
        exponents: `[axes][pairs]`, for "ntk" and "frequency-aware".
        scale: Target length / trained length, one per axis, at least 1.
        trained: Trained length of each axis, in positions; for the last four methods.
        ramp: Turns within the trained length between which "yarn" blends.
        k: For "riflex", which pair of each axis is the intrinsic one, counted from 1.

    Returns:
        `[axes][pairs]`.

    Raises:
        ValueError: A number does not fit the method.
    """
    rows: list[tuple[float, ...]] = []
    for axis, row in enumerate(frequencies):
        s = scale[axis]
        if s == 1.0 or not any(row):
            rows.append(row)
        elif method == "interpolation":
            rows.append(tuple(theta / s for theta in row))
        elif method == "ntk":
            rows.append(tuple(w * s**-e for w, e in zip(row, exponents[axis], strict=True)))
        elif method == "frequency-aware":
            target = _trained_exponent(base[axis], trained[axis])
            shares = (min(e / target, 1.0) for e in exponents[axis])
            rows.append(tuple(w * s**-share for w, share in zip(row, shares, strict=True)))
        elif method == "yarn":
            rows.append(tuple(_by_parts(theta, s, trained[axis], ramp) for theta in row))
        elif method == "riflex":
            rows.append(_intrinsic(row, s, trained[axis], None if k is None else k[axis]))
        else:
            rows.append(row)
    return tuple(rows)


def yarn_scale(scale: float, head_dim: int) -> float:
    """Compute the factor on the scores that YaRN recommends: (0.1 ln s + 1)^2 / sqrt(head_dim).

    Args:
        scale: Target length / trained length, at least 1.
        head_dim: Channels of a head.

    Returns:
        A number for `attention(..., scale=...)`.

    Raises:
        ValueError: `scale` is below 1, or `head_dim` below 1.

    Source:
        YaRN, arXiv 2309.00071, fitted to language models: sqrt(1 / t) = 0.1 ln s + 1, which there
        multiplies q and k each.

    >>> yarn_scale(1.0, 64)
    0.125
    """
    if scale < 1 or head_dim < 1:
        raise ValueError(f"scale is {scale} and head_dim {head_dim}; expected both at least 1")
    return (0.1 * math.log(scale) + 1.0) ** 2 / math.sqrt(head_dim)


def _trained_exponent(base: float, trained: float) -> float:
    """Find the exponent of the pair whose wavelength is the trained length."""
    if base <= 1.0 or trained <= 2 * math.pi:
        raise ValueError(
            f"base is {base} and trained {trained}; 'frequency-aware' needs a base above 1 and a "
            "trained length above 2 pi positions; use 'interpolation' for shorter axes"
        )
    return math.log(trained / (2 * math.pi)) / math.log(base)


def _by_parts(theta: float, scale: float, trained: float, ramp: tuple[float, float]) -> float:
    low, high = ramp
    turns = trained * abs(theta) / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return theta * ((1.0 - kept) / scale + kept)


def _intrinsic(
    row: tuple[float, ...], scale: float, trained: float, k: int | None
) -> tuple[float, ...]:
    own = [pair for pair, theta in enumerate(row) if theta != 0.0]
    if k is None:
        pair = min(own, key=lambda pair: abs(2 * math.pi / row[pair] - trained))
    elif 1 <= k <= len(own):
        pair = own[k - 1]
    else:
        raise ValueError(f"k is {k}; expected 1 to {len(own)}, the pairs of the axis, from 1")
    lowered = min(row[pair], RIFLEX_MARGIN * 2 * math.pi / (trained * scale))
    return (*row[:pair], lowered, *row[pair + 1 :])
