"""Time grids by formula: equal steps, logistic curves, and those of other samplers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowsolvers.warps import Schedule, number

__all__ = [
    "beta",
    "cosine",
    "karras",
    "linear_quadratic",
    "logistic",
    "lumina_rational",
    "lumina_sigmoid",
    "polyexponential",
    "sigmoid",
    "uniform",
]


@dataclass(frozen=True)
class _Identity:
    def __call__(self, u: float) -> float:
        return u

    def inverse(self, t: float) -> float:
        return t

    def slope(self, u: float) -> float:
        del u
        return 1.0


@dataclass(frozen=True)
class _SineSquared:
    def __call__(self, u: float) -> float:
        return math.sin(0.5 * math.pi * u) ** 2

    def inverse(self, t: float) -> float:
        return 2 / math.pi * math.asin(math.sqrt(t))

    def slope(self, u: float) -> float:
        return 0.5 * math.pi * math.sin(math.pi * u)


@dataclass(frozen=True)
class _TwoSlopeLogistic:
    mu: float
    alpha: float
    beta: float

    def logistic(self, u: float) -> float:
        slope = self.alpha if u < self.mu else self.beta
        return 0.5 * (1.0 + math.tanh(0.5 * slope * (u - self.mu)))  # cannot overflow

    def logit(self, f: float) -> float:
        slope = self.alpha if f < 0.5 else self.beta
        return self.mu + (math.log(f) - math.log1p(-f)) / slope

    def steepness(self, u: float) -> float:
        slope, f = self.alpha if u < self.mu else self.beta, self.logistic(u)
        return slope * f * (1.0 - f)

    def __call__(self, u: float) -> float:
        low, high = self.logistic(0.0), self.logistic(1.0)
        return (self.logistic(u) - low) / (high - low)

    def inverse(self, t: float) -> float:
        low, high = self.logistic(0.0), self.logistic(1.0)
        return self.logit(low + t * (high - low))

    def slope(self, u: float) -> float:
        return self.steepness(u) / (self.logistic(1.0) - self.logistic(0.0))


@dataclass(frozen=True)
class _PrintedSigmoid(_TwoSlopeLogistic):
    def __call__(self, u: float) -> float:
        return u if u in (0.0, 1.0) else self.logistic(u)

    def inverse(self, t: float) -> float:
        if not self.logistic(0.0) < t < self.logistic(1.0):
            return round(t)  # inside the first or the last step, however short
        return self.logit(t)

    def slope(self, u: float) -> float:
        return self.steepness(u)


@dataclass(frozen=True)
class _PrintedRational:
    sigma: float

    def __call__(self, u: float) -> float:
        return 1.0 if u == 1.0 else u / (self.sigma - u + self.sigma * u)

    def inverse(self, t: float) -> float:
        return self.sigma * t / max(1.0 - (self.sigma - 1.0) * t, self.sigma * t)

    def slope(self, u: float) -> float:
        return self.sigma / (self.sigma - u + self.sigma * u) ** 2


@dataclass(frozen=True)
class _Karras:
    rho: float
    sigma_min: float

    def __call__(self, u: float) -> float:
        root = self.sigma_min ** (1 / self.rho)
        sigma = (1.0 + u * (root - 1.0)) ** self.rho
        return (1.0 - sigma) / (1.0 - self.sigma_min)

    def inverse(self, t: float) -> float:
        sigma = 1.0 - t * (1.0 - self.sigma_min)
        return (1.0 - sigma ** (1 / self.rho)) / (1.0 - self.sigma_min ** (1 / self.rho))

    def slope(self, u: float) -> float:
        fall = 1.0 - self.sigma_min ** (1 / self.rho)
        return self.rho * fall * (1.0 - u * fall) ** (self.rho - 1) / (1.0 - self.sigma_min)


@dataclass(frozen=True)
class _Exponential:
    sigma_min: float
    rho: float

    def __call__(self, u: float) -> float:
        rate = math.log(self.sigma_min)
        return math.expm1(rate * (1.0 - (1.0 - u) ** self.rho)) / math.expm1(rate)

    def inverse(self, t: float) -> float:
        rate = math.log(self.sigma_min)
        done = math.log1p(t * math.expm1(rate)) / rate
        return 1.0 - max(1.0 - done, 0.0) ** (1 / self.rho)

    def slope(self, u: float) -> float:
        rate, left = math.log(self.sigma_min), 1.0 - u
        speed = self.rho * left ** (self.rho - 1)
        return speed * rate * math.exp(rate * (1.0 - left**self.rho)) / math.expm1(rate)


@dataclass(frozen=True)
class _LinearQuadratic:
    threshold: float
    linear: float

    def parts(self) -> tuple[float, float]:
        """Slope of the line, and what multiplies the square."""
        slope = self.threshold / self.linear
        return slope, (1.0 - slope) / (1.0 - self.linear) ** 2

    def __call__(self, u: float) -> float:
        slope, square = self.parts()
        if u == 1.0:
            return 1.0  # the sum below may miss it by rounding
        return slope * u + square * max(u - self.linear, 0.0) ** 2

    def inverse(self, t: float) -> float:
        slope, square = self.parts()
        rest = t - self.threshold
        if rest <= 0.0:
            return t / slope
        return self.linear + 2 * rest / (slope + math.sqrt(slope * slope + 4 * square * rest))

    def slope(self, u: float) -> float:
        slope, square = self.parts()
        return slope + 2 * square * max(u - self.linear, 0.0)


@dataclass(frozen=True)
class _BetaQuantile:
    a: float
    b: float

    def density(self, t: float) -> float:
        if not 0.0 < t < 1.0:
            power = (self.a if t <= 0.0 else self.b) - 1.0
            edge = (self.b if t <= 0.0 else self.a) if power == 0.0 else 0.0
            return math.inf if power < 0.0 else edge
        a, b = self.a, self.b
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return math.exp((a - 1) * math.log(t) + (b - 1) * math.log1p(-t) - log_beta)

    def inverse(self, t: float) -> float:
        """Return the regularised incomplete beta function I_t(a, b)."""
        if not 0.0 < t < 1.0:
            return min(max(t, 0.0), 1.0)
        a, b = self.a, self.b
        front = t * (1.0 - t) * self.density(t)
        if t < (a + 1) / (a + b + 2):
            return front * _beta_fraction(a, b, t) / a
        return 1.0 - front * _beta_fraction(b, a, 1.0 - t) / b

    def __call__(self, u: float) -> float:
        if u in (0.0, 1.0):
            return u
        low, high, t = 0.0, 1.0, self.a / (self.a + self.b)
        for _ in range(200):  # Newton's step where it stays inside the bracket, else its middle
            miss = self.inverse(t) - u
            low, high = (low, t) if miss > 0.0 else (t, high)
            newton = t - miss / self.density(t)
            following = newton if low < newton < high else 0.5 * (low + high)
            if following == t or abs(following - t) <= 1e-16 * t:
                break
            t = following
        return t

    def slope(self, u: float) -> float:
        density = self.density(self(u))
        return 1.0 / density if density else math.inf


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, DLMF 8.17.22, by Lentz's method."""
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d, c = 1.0 / (1.0 + term * d), 1.0 + term / c
            change = c * d
            value *= change
        if abs(change - 1.0) < 3e-16:
            break
    return value


def uniform() -> Schedule:
    """Return the grid of equal steps, t = u.

    Returns:
        The schedule `uniform`.

    Example:
        >>> uniform().grid(4)
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    return Schedule("uniform", _Identity())


def cosine() -> Schedule:
    """Shorten the steps at both ends alike, t = sin²(πu / 2).

    Returns:
        The schedule `cosine`.

    Example:
        >>> round(cosine()(1 / 3), 12)
        0.25
    """
    return Schedule("cosine", _SineSquared())


def sigmoid(mu: float = 0.6, alpha: float = 6.0, beta: float = 20.0) -> Schedule:
    """Shorten the steps at both ends with a logistic curve of two slopes.

    With s(z) = 1 / (1 + e^-z) the curve is f(u) = s(alpha·(u - mu)) for u < mu and
    s(beta·(u - mu)) from mu on; t = (f(u) - f(0)) / (f(1) - f(0)).

    Args:
        mu: Where the slope changes and the steps are longest, in [0, 1].
        alpha: Slope below mu, greater than 0.
        beta: Slope above mu, greater than 0.

    Returns:
        The schedule `sigmoid:MU,ALPHA,BETA`.

    Raises:
        ValueError: `mu` is outside [0, 1], or a slope is not finite and greater than 0, or
            too small to tell from 0.

    Source: Lumina-Next, arXiv 2406.18583, sigmoid schedule. The paper's curve runs from
        f(0) = .0266 to f(1) = .99966; here it is rescaled to run from 0 to 1. `lumina_sigmoid`
        is the curve as printed.

    Example:
        >>> [round(t, 4) for t in sigmoid().grid(4)]
        [0.0, 0.0848, 0.3368, 0.9516, 1.0]
    """
    name, warp = _two_slopes("sigmoid", mu, alpha, beta)
    return Schedule(name, warp)


def lumina_sigmoid(mu: float = 0.6, alpha: float = 6.0, beta: float = 20.0) -> Schedule:
    """Take the logistic curve of two slopes as it is, and set the ends.

    t = f(u) of `sigmoid` for 0 < u < 1, but t(0) = 0 and t(1) = 1.

    Args:
        mu: Where the slope changes and the steps are longest, in [0, 1].
        alpha: Slope below mu, greater than 0.
        beta: Slope above mu, greater than 0.

    Returns:
        The schedule `lumina-sigmoid:MU,ALPHA,BETA`.

    Raises:
        ValueError: As for `sigmoid`.

    Convention: The first step jumps over [0, f(0)] and the last over [f(1), 1], however many
        steps there are; the inverse maps the whole of them to 0 and to 1.

    Source: Lumina-Next, arXiv 2406.18583, sigmoid schedule, as printed.

    Example:
        >>> [round(t, 4) for t in lumina_sigmoid().grid(4)]
        [0.0, 0.1091, 0.3543, 0.9526, 1.0]
    """
    name, warp = _two_slopes("lumina-sigmoid", mu, alpha, beta)
    return Schedule(name, _PrintedSigmoid(warp.mu, warp.alpha, warp.beta))


def _two_slopes(kind: str, mu: float, alpha: float, beta: float) -> tuple[str, _TwoSlopeLogistic]:
    _check_centre(kind, "mu", mu)
    _check_positive(kind, alpha=alpha, beta=beta)
    name = f"{kind}:{number(mu)},{number(alpha)},{number(beta)}"
    warp = _TwoSlopeLogistic(float(mu), float(alpha), float(beta))
    if not warp.logistic(0.0) < warp.logistic(1.0):
        raise ValueError(f"{name} is flat in floating point; take larger slopes, or uniform()")
    return name, warp


def logistic(k: float = 4.0, m: float = 0.5) -> Schedule:
    """Shorten the steps at both ends with a logistic curve.

    With s(z) = 1 / (1 + e^-z), t = (s(k·(u - m)) - s(-k·m)) / (s(k·(1 - m)) - s(-k·m)).

    Args:
        k: Slope, greater than 0; towards 0 the grid becomes uniform.
        m: Where the steps are longest, in [0, 1]; 0.5 is symmetric, above it the steps near
            noise are the shorter ones.

    Returns:
        The schedule `logistic:K,M`.

    Raises:
        ValueError: `m` is outside [0, 1], or `k` is not finite and greater than 0, or too
            small to tell from 0.

    Example:
        >>> [round(t, 4) for t in logistic().grid(4)]
        [0.0, 0.1966, 0.5, 0.8034, 1.0]
    """
    _check_centre("logistic", "m", m)
    _check_positive("logistic", k=k)
    _, warp = _two_slopes("logistic", m, k, k)
    return Schedule(f"logistic:{number(k)},{number(m)}", warp)


def lumina_rational(sigma: float) -> Schedule:
    """Take the rational curve of Lumina-Next as printed, t = u / (s - u + s·u), and set the end.

    Args:
        sigma: s, at least 1; 1 is uniform.

    Returns:
        The schedule `lumina-rational:SIGMA`.

    Raises:
        ValueError: `sigma` is not finite and at least 1.

    Convention: The curve ends at 1 / (2s - 1), so the last step jumps from below that to 1,
        however many steps there are. What the released code computes, and what to use, is
        `shift`.

    Source: Lumina-Next, arXiv 2406.18583, rational schedule, as printed.

    Example:
        >>> [round(t, 4) for t in lumina_rational(4.0).grid(4)]
        [0.0, 0.0526, 0.0909, 0.12, 1.0]
    """
    if not (math.isfinite(sigma) and sigma >= 1.0):
        raise ValueError(f"sigma of lumina-rational must be finite and at least 1, got {sigma!r}")
    return Schedule(f"lumina-rational:{number(sigma)}", _PrintedRational(float(sigma)))


def karras(rho: float = 7.0, sigma_min: float = 0.001) -> Schedule:
    """Shorten the steps near data by a power of the noise level.

    σ = (1 + u·(m^(1/ρ) - 1))^ρ with m = sigma_min falls from 1 to m; t = (1 - σ) / (1 - m).

    Args:
        rho: ρ, at least 1; 1 is uniform.
        sigma_min: m, in [0, 1).

    Returns:
        The schedule `karras:RHO,SIGMA_MIN`.

    Raises:
        ValueError: `rho` is not finite and at least 1, or `sigma_min` is outside [0, 1).

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv 2206.00364, eq. 5, with sigma_max = 1. They append σ = 0 after sigma_min; here the
        curve is rescaled to end at 0.

    Example:
        >>> [round(t, 4) for t in karras().grid(4)]
        [0.0, 0.6977, 0.9292, 0.9893, 1.0]
    """
    if not (math.isfinite(rho) and rho >= 1.0):
        raise ValueError(f"rho of karras must be finite and at least 1, got {rho!r}")
    if not 0.0 <= sigma_min < 1.0:
        raise ValueError(f"sigma_min of karras must be in [0, 1), got {sigma_min!r}")
    name = f"karras:{number(rho)},{number(sigma_min)}"
    return Schedule(name, _Karras(float(rho), float(sigma_min)))


def polyexponential(sigma_min: float = 0.001, rho: float = 1.0) -> Schedule:
    """Shorten the steps near data so that the log of the noise level falls evenly.

    σ = m^(1 - (1 - u)^ρ) with m = sigma_min falls from 1 to m; t = (1 - σ) / (1 - m).

    Args:
        sigma_min: m, in (0, 1).
        rho: ρ, at least 1; 1 is known as exponential.

    Returns:
        The schedule `polyexponential:SIGMA_MIN,RHO`.

    Raises:
        ValueError: `sigma_min` is outside (0, 1), or `rho` is not finite and at least 1.

    Source: The schedules of the same names in k-diffusion, with sigma_max = 1. It appends σ = 0
        after sigma_min; here the curve is rescaled to end at 0.

    Example:
        >>> [round(t, 4) for t in polyexponential(0.01).grid(4)]
        [0.0, 0.6907, 0.9091, 0.9782, 1.0]
    """
    if not 0.0 < sigma_min < 1.0:
        raise ValueError(f"sigma_min of polyexponential must be in (0, 1), got {sigma_min!r}")
    if not (math.isfinite(rho) and rho >= 1.0):
        raise ValueError(f"rho of polyexponential must be finite and at least 1, got {rho!r}")
    name = f"polyexponential:{number(sigma_min)},{number(rho)}"
    return Schedule(name, _Exponential(float(sigma_min), float(rho)))


def linear_quadratic(threshold: float = 0.025, linear: float = 0.5) -> Schedule:
    """Spend a fraction of the steps on a little time near noise, then speed up evenly.

    t = (τ/f)·u up to u = f, and (τ/f)·u + q·(u - f)² from there, with q such that t(1) = 1;
    the slope has no jump.

    Args:
        threshold: τ, where the line ends, in (0, linear].
        linear: f, the fraction of steps on the line, in (0, 1).

    Returns:
        The schedule `linear-quadratic:THRESHOLD,LINEAR`.

    Raises:
        ValueError: A number is out of range.

    Source: The schedule of Mochi 1 (Genmo, 2024), which it equals at f = 1/2 for even numbers
        of steps.

    Example:
        >>> [round(t, 4) for t in linear_quadratic().grid(4)]
        [0.0, 0.0125, 0.025, 0.275, 1.0]
    """
    if not 0.0 < linear < 1.0:
        raise ValueError(f"linear of linear-quadratic must be in (0, 1), got {linear!r}")
    if not 0.0 < threshold <= linear:
        raise ValueError(
            f"threshold of linear-quadratic must be in (0, linear = {linear!r}], got {threshold!r}"
        )
    name = f"linear-quadratic:{number(threshold)},{number(linear)}"
    return Schedule(name, _LinearQuadratic(float(threshold), float(linear)))


def beta(a: float = 0.6, b: float = 0.6) -> Schedule:
    """Place the times at even quantiles of a beta distribution.

    Args:
        a: In (0, 100]; below 1 the steps near noise are short.
        b: In (0, 100]; below 1 the steps near data are short.

    Returns:
        The schedule `beta:A,B`.

    Raises:
        ValueError: A number is out of range.

    Convention: The distribution is that of t, so a belongs to noise. Written for the noise level
        1 - t, the two change places.

    Source: Lee et al., Beta Sampling is All You Need, arXiv 2407.12173.

    Example:
        >>> [round(t, 4) for t in beta().grid(4)]
        [0.0, 0.1757, 0.5, 0.8243, 1.0]
    """
    for letter, value in (("a", a), ("b", b)):
        if not 0.0 < value <= 100.0:
            raise ValueError(f"{letter} of beta must be in (0, 100], got {value!r}")
    return Schedule(f"beta:{number(a)},{number(b)}", _BetaQuantile(float(a), float(b)))


def _check_centre(kind: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} of {kind} must be in [0, 1], got {value!r}")


def _check_positive(kind: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name} of {kind} must be finite and greater than 0, got {value!r}")
