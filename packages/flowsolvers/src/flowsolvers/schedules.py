"""Time grids by name.

A schedule prints as its name, and the name is parsed back. The kinds are in `curves`, `shifts`
and `piecewise`; what they share is in `warps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from flowsolvers.curves import (
    beta,
    cosine,
    karras,
    linear_quadratic,
    logistic,
    lumina_rational,
    lumina_sigmoid,
    polyexponential,
    sigmoid,
    uniform,
)
from flowsolvers.piecewise import from_times
from flowsolvers.shifts import flux_shift, sd3_shift, shift, terminal
from flowsolvers.spelling import closest_first
from flowsolvers.warps import Schedule

__all__ = [
    "Schedule",
    "beta",
    "cosine",
    "flux_shift",
    "from_times",
    "karras",
    "linear_quadratic",
    "logistic",
    "lumina_rational",
    "lumina_sigmoid",
    "polyexponential",
    "schedule",
    "sd3_shift",
    "shift",
    "sigmoid",
    "terminal",
    "uniform",
]


def _times(*numbers: float) -> Schedule:
    return from_times(numbers)


def _auto(nfe: float) -> Schedule:
    from flowsolvers.auto import AUTO  # which is laid out on schedules

    if nfe != int(nfe) or nfe < 1:
        raise ValueError(f"the budget must be an integer of at least 1, got {nfe!r}")
    return AUTO.default_schedule(int(nfe))


#: name -> (how it is written, least and most numbers, what makes it)
_FORMS: dict[str, tuple[str, int, float, Callable[..., Schedule]]] = {
    "auto": ("auto:NFE", 1, 1, _auto),
    "beta": ("beta:A,B", 0, 2, beta),
    "cosine": ("cosine", 0, 0, cosine),
    "polyexponential": ("polyexponential:SIGMA_MIN,RHO", 0, 2, polyexponential),
    "karras": ("karras:RHO,SIGMA_MIN", 0, 2, karras),
    "linear-quadratic": ("linear-quadratic:THRESHOLD,LINEAR", 0, 2, linear_quadratic),
    "logistic": ("logistic:K,M", 0, 2, logistic),
    "lumina-rational": ("lumina-rational:SIGMA", 1, 1, lumina_rational),
    "lumina-sigmoid": ("lumina-sigmoid:MU,ALPHA,BETA", 0, 3, lumina_sigmoid),
    "shift": ("shift:SIGMA", 1, 1, shift),
    "sigmoid": ("sigmoid:MU,ALPHA,BETA", 0, 3, sigmoid),
    "terminal": ("terminal:SIGMA", 1, 1, terminal),
    "times": ("times:0,T,...,1", 2, math.inf, _times),
    "uniform": ("uniform", 0, 0, uniform),
}


def schedule(name: str) -> Schedule:
    """Parse the name that a schedule prints.

    Args:
        name: `uniform`, `cosine`, `shift:SIGMA`, `sigmoid:MU,ALPHA,BETA`, `logistic:K,M`,
            `beta:A,B`, `karras:RHO,SIGMA_MIN`, `polyexponential:SIGMA_MIN,RHO`,
            `linear-quadratic:THRESHOLD,LINEAR`, `lumina-rational:SIGMA`,
            `lumina-sigmoid:MU,ALPHA,BETA`, `terminal:SIGMA`, `auto:NFE`, `times:0,T,...,1`
            (numbers that are left out take their defaults); one of these with `^-1` after it, for
            its inverse; or several joined with `@`.

    Returns:
        The schedule, equal to the one that printed the name.

    Raises:
        ValueError: The name is unknown, or its numbers are too few, too many or out of range.

    Example:
        >>> schedule("shift:4@cosine") == shift(4.0) @ cosine()
        True
    """
    outer, *inner = (_parse(part.strip()) for part in name.split("@"))
    for one in inner:
        outer = outer @ one
    return outer


def _parse(text: str) -> Schedule:
    if text.endswith("^-1"):
        return _parse(text.removesuffix("^-1")).inverse()
    head, colon, tail = text.partition(":")
    forms = ", ".join(_FORMS[form][0] for form in closest_first(head, _FORMS))
    if head not in _FORMS:
        raise ValueError(f"unknown schedule {text!r}; accepted, closest first: {forms}")
    form, least, most, make = _FORMS[head]
    try:
        numbers = [float(number) for number in tail.split(",")] if colon else []
    except ValueError:
        numbers = None
    if numbers is None or not least <= len(numbers) <= most:
        raise ValueError(f"schedule {text!r} is not of the form {form}; accepted: {forms}")
    try:
        return make(*numbers)
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}; accepted: {forms}") from error
