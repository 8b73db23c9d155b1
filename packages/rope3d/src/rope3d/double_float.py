"""Double-float arithmetic: a number as the unevaluated sum of two float32, about 48 bits.

What a sum or product of float32 numbers loses in rounding is a float32 number itself and can be
recovered without float64. PyTorch has no fused multiply-add, so products are cut in halves.

Source:
    Dekker, A floating-point technique for extending the available precision, 1971; Knuth, The Art
    of Computer Programming, vol. 2, 4.2.2, for the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "Pair",
    "add",
    "constant",
    "divide",
    "exact_product",
    "exact_sum",
    "exp2",
    "multiply",
    "split",
]

#: The leading part, and what it lacks.
Pair = tuple[Tensor, Tensor]

# 2^12 + 1 cuts the 24 bits of a float32 in two halves whose products are exact.
_SPLITTER = 4097.0


def split(value: float) -> tuple[float, float]:
    """Write a Python number in two parts that are float32 numbers.

    Do it before tracing: torch.compile takes a float for a real number and simplifies.

    Args:
        value: Any finite number.

    Returns:
        The leading part, and what it lacks.

    >>> sum(split(0.1)) == 0.1
    True
    """
    scaled = value * 536870913.0  # 2^29 + 1: of 53 bits the first 24 are left
    high = scaled - (scaled - value)
    return high, value - high


def constant(parts: tuple[float, float], like: Tensor) -> Pair:
    """Repeat a number that `split` wrote, in the shape of a float32 tensor and on its device."""
    zero = torch.zeros_like(like)
    return zero + parts[0], zero + parts[1]


def exact_sum(a: Tensor, b: Tensor) -> Pair:
    """Add two float32 numbers of any size without loss."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def exact_product(a: Tensor, b: Tensor) -> Pair:
    """Multiply two float32 numbers without loss."""
    return _product(a, b, _halves(b))


def add(a: Pair, b: Pair) -> Pair:
    """Add two numbers of like sign, or of which one is clearly larger."""
    high, low = exact_sum(a[0], b[0])
    return exact_sum(high, low + (a[1] + b[1]))


def multiply(a: Pair, b: Pair) -> Pair:
    """Multiply two numbers."""
    high, low = exact_product(a[0], b[0])
    return exact_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def divide(a: Pair, b: Pair) -> Pair:
    """Divide two numbers."""
    quotient = a[0] / b[0]
    high, low = exact_product(quotient, b[0])
    rest = ((a[0] - high) - low) + (a[1] - quotient * b[1])
    return exact_sum(quotient, rest / b[0])


# 2^f = sum of (ln 2)^n / n! f^n; |f| <= 1/2 makes the 14th term 4e-16.
_TERMS = tuple(split(math.log(2) ** n / math.factorial(n)) for n in range(14))

# Terms from here on are so small that float32 is enough.
_SMALL = 6


def exp2(x: Pair) -> Pair:
    """Raise 2 to a power above -126.

    Args:
        x: Any shape.

    Returns:
        Of the same shape, to about 12 digits.

    >>> high, low = exp2(constant(split(-3.5), torch.zeros(())))
    >>> abs((high.double() + low.double()).item() / 2**-3.5 - 1) < 1e-12
    True
    """
    whole = x[0].round()
    fraction, rest = exact_sum(x[0] - whole, x[1])
    halves = _halves(fraction)
    high = torch.zeros_like(fraction)
    for term, _ in reversed(_TERMS[_SMALL:]):
        high = high * fraction + term
    low = torch.zeros_like(high)
    for term, lacks in reversed(_TERMS[:_SMALL]):
        product, error = _product(high, fraction, halves)
        high = product + term  # the term is the larger one
        low = (term - high + product) + (error + low * fraction + lacks)
    low = low + high * rest * math.log(2)
    # The power of two is written by its exponent bits: functions of devices may round it.
    factor = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    high, low = exact_sum(high, low)
    return high * factor, low * factor


def _product(a: Tensor, b: Tensor, b_halves: Pair) -> Pair:
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = b_halves
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(x: Tensor) -> Pair:
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    return high, x - high
