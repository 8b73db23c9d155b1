"""Paths from noise to data, and what a model can predict on them.

x_t = α(t)·data + σ(t)·noise. A velocity, a score, the noise and the data are four ways to say
the same thing: given x_t, each is a line in any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from flowsolvers.context import Context, evaluate, jumps, model_rows
from flowsolvers.spelling import closest_first
from flowsolvers.velocity import Velocity

__all__ = ["GVP", "VP", "Linear", "Path", "Prediction"]

#: velocity: E[dx_t/dt | x_t]; score: ∇ log p_t(x_t); noise and data: E[noise | x_t], E[data | x_t].
Prediction: TypeAlias = Literal["velocity", "score", "noise", "data"]


class Path(ABC):
    """How much data and how much noise there is at each time.

    A path of one's own gives `alpha`, `sigma` and their derivatives; the rest follows.

    Example:
        >>> path = Linear()
        >>> path.interpolate(torch.tensor([4.0]), torch.tensor([0.0]), 0.25)
        tensor([1.])
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return α(t), rising to 1 at t=1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return σ(t), falling to 0 at t=1."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return dα/dt."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return dσ/dt."""

    def interpolate(self, data: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """Mix data and noise.

        Args:
            data: At t=1.
            noise: Of the same shape.
            t: In [0, 1], a number or a tensor that broadcasts with the data.

        Returns:
            x_t.

        Example:
            >>> Linear().interpolate(torch.ones(2), torch.zeros(2), 0.5)
            tensor([0.5000, 0.5000])
        """
        time = _time(t, data)
        return self.alpha(time) * data + self.sigma(time) * noise

    def convert(
        self, value: Tensor, t: float | Tensor, x: Tensor, source: Prediction, target: Prediction
    ) -> Tensor:
        """Turn one prediction into another.

        Args:
            value: What was predicted, shaped like x.
            t: In (0, 1), a number or a tensor that broadcasts with x. The ends are singular
                where a conversion divides by α, by σ, or both; velocity to data is not at t=0,
                and velocity to noise is not at t=1.
            x: x_t.
            source: What the value is: `velocity`, `score`, `noise` or `data`.
            target: What to return.

        Returns:
            The other prediction, shaped like x.

        Raises:
            ValueError: `source` or `target` is none of the four.

        Convention: The score is -noise / σ.

        Source: Ma et al., SiT, arXiv 2401.08740, written for α rising to 1 at data.

        Example:
            >>> x, v = torch.tensor([1.0]), torch.tensor([2.0])
            >>> Linear().convert(v, 0.5, x, "velocity", "data")
            tensor([2.])
        """
        for name in (source, target):
            _check(name)
        if source == target:
            return value
        a, b = self.weights(t, x, source, target)
        return a * x + b * value

    def weights(
        self, t: float | Tensor, x: Tensor, source: Prediction, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """Write a conversion as a·x + b·value.

        Args:
            t: In (0, 1).
            x: Gives the dtype and device.
            source: What the value is.
            target: What to return.

        Returns:
            a and b, shaped like t.

        Example:
            >>> a, b = Linear().weights(0.5, torch.ones(1), "velocity", "score")
            >>> a.item(), b.item()
            (-2.0, 1.0)
        """
        time = _time(t, x)
        alpha, sigma = self.alpha(time), self.sigma(time)
        alpha_dot, sigma_dot = self.alpha_dot(time), self.sigma_dot(time)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        wronskian = alpha_dot * sigma - sigma_dot * alpha  # > 0
        # data = a·x + b·value of the source, and value = a·x + b·data of the target; likewise
        # with noise where that avoids a division by α.
        if source == target:
            return zero, one
        to_data = {
            "velocity": (-sigma_dot / wronskian, sigma / wronskian),
            "data": (zero, one),
            "noise": (1 / alpha, -sigma / alpha),
            "score": (1 / alpha, sigma * sigma / alpha),
        }
        to_noise = {
            "velocity": (alpha_dot / wronskian, -alpha / wronskian),
            "data": (1 / sigma, -alpha / sigma),
            "noise": (zero, one),
            "score": (zero, -sigma),
        }
        if target == "data":
            return to_data[source]
        if target == "velocity":
            if source == "data":
                return sigma_dot / sigma, wronskian / sigma
            a, b = to_noise[source]
            return alpha_dot / alpha - wronskian / alpha * a, -wronskian / alpha * b
        a, b = to_noise[source]
        return (a, b) if target == "noise" else (-a / sigma, -b / sigma)

    def velocity(self, model: Velocity, prediction: Prediction) -> Velocity:
        """Make a velocity of a model that predicts something else.

        Args:
            model: `model(t, x)` returns the prediction; it may be guided.
            prediction: What it predicts.

        Returns:
            `velocity(t, x) -> dx/dt`, singular where `convert` is; start a solve of a noise or
            score model after t=0, and end that of a data model before t=1.

        Raises:
            ValueError: `prediction` is none of the four.

        Example:
            >>> v = Linear().velocity(lambda t, x: torch.full_like(x, 3.0), "data")
            >>> v(torch.tensor(0.5), torch.ones(1))  # (3 - 1) / (1 - 0.5)
            tensor([4.])
        """
        _check(prediction)
        return _Converted(self, model, prediction)


@dataclass(frozen=True, eq=False)
class _Converted:
    """A model's prediction as a velocity."""

    path: Path
    model: Velocity
    prediction: Prediction
    takes_context: ClassVar[bool] = True

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        value = evaluate(self.model, t, x, context)
        return self.path.convert(value, t, x, self.prediction, "velocity")

    def rows(self, context: Context | None = None) -> int:
        return model_rows(self.model, context)

    @property
    def jumps(self) -> tuple[float, ...]:
        return jumps(self.model)


@dataclass(frozen=True)
class Linear(Path):
    """The straight path, α = t and σ = 1 - t, of rectified flow and of Lumina.

    Source: Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747.

    Example:
        >>> Linear().sigma(torch.tensor(0.25))
        tensor(0.7500)
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Return t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)


@dataclass(frozen=True)
class GVP(Path):
    """The path on the circle, α = sin(πt/2) and σ = cos(πt/2).

    Source: Ma et al., SiT, arXiv 2401.08740, generalised variance-preserving path.

    Example:
        >>> GVP().alpha(torch.tensor(1.0))
        tensor(1.)
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Return sin(πt/2)."""
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """Return cos(πt/2)."""
        return torch.cos(math.pi / 2 * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return π/2·cos(πt/2)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return -π/2·sin(πt/2)."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class VP(Path):
    """The path of variance-preserving diffusion, with α² + σ² = 1.

    log α = -(1 - t)²·(b - a)/4 - (1 - t)·a/2

    Args:
        sigma_min: a, the rate of noising at data, at least 0.
        sigma_max: b, that at noise, greater than `sigma_min`.

    Raises:
        ValueError: 0 <= sigma_min < sigma_max < ∞ does not hold.

    Convention: α(0) = .0066 with the defaults, not 0: the start is noise but for that. The names
        are SiT's; in Song et al. the rates are β.

    Source: Song et al., arXiv 2011.13456, appendix C; Ma et al., SiT, arXiv 2401.08740.

    Example:
        >>> VP().sigma(torch.tensor(1.0))
        tensor(0.)
    """

    sigma_min: float = 0.1
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        """Prove the ranges."""
        if not 0.0 <= self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"VP needs 0 <= sigma_min < sigma_max < ∞, got {self.sigma_min!r} and "
                f"{self.sigma_max!r}"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """Return α."""
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Return √(1 - α²)."""
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return α·d log α/dt."""
        return self.alpha(t) * self._log_alpha_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return -α²/σ·d log α/dt, infinite at t=1."""
        return -(self.alpha(t) ** 2) * self._log_alpha_dot(t) / self.sigma(t)

    def _log_alpha(self, t: Tensor) -> Tensor:
        left = 1 - t
        return -0.25 * left**2 * (self.sigma_max - self.sigma_min) - 0.5 * left * self.sigma_min

    def _log_alpha_dot(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.sigma_max - self.sigma_min) + 0.5 * self.sigma_min


def _time(t: float | Tensor, x: Tensor) -> Tensor:
    return t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=x.dtype, device=x.device)


def _check(name: str) -> None:
    accepted = cast("tuple[str, ...]", get_args(Prediction))
    if name not in accepted:
        names = ", ".join(closest_first(name, accepted))
        raise ValueError(f"unknown prediction {name!r}; accepted, closest first: {names}")
