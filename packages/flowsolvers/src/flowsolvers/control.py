"""How long the next step is, given how large the error of this one was."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Controller"]

#: Error ratios below this count as this, so that the next step stays finite.
_LEAST = 1e-30


@dataclass(frozen=True)
class Controller:
    """A PID rule for the step's length.

    With e the ratio of the error to the tolerance in this step, e' and e'' those of the accepted
    steps before it, and q the order, the next step is longer by the factor

        safety · e^-((I + P + D)/q) · e'^((P + 2D)/q) · e''^-(D/q),

    kept between `shrink` and `grow`, and not below 1 after an accepted step. With P = D = 0 it
    is the classic rule; a pair on a stiff flow rejects less with I = 0.3 and P = 0.4.

    Args:
        safety: Above 0 and at most 1.
        shrink: Least factor, above 0 and below 1.
        grow: Greatest factor, above 1.
        integral: I.
        proportional: P.
        derivative: D.
        min_step: A step this short is accepted whatever its error, if that is finite, and none
            is shorter, but to land on an end or a jump; 0 for none such.
        max_step: No step is longer.

    Raises:
        ValueError: A number is out of its range.

    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, II.4; Söderlind,
        Digital filters in adaptive time-stepping, ACM Trans. Math. Softw. 29 (2003), eq. 34.

    Example:
        >>> round(Controller().factor(1 / 32, True, order=5), 3)  # 0.9 · 32^(1/5)
        1.8
    """

    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    integral: float = 1.0
    proportional: float = 0.0
    derivative: float = 0.0
    min_step: float = 0.0
    max_step: float = math.inf

    def __post_init__(self) -> None:
        """Prove the ranges."""
        if not 0.0 < self.safety <= 1.0:
            raise ValueError(f"safety must be above 0 and at most 1, got {self.safety!r}")
        if not 0.0 < self.shrink < 1.0 < self.grow < math.inf:
            raise ValueError(
                f"a controller needs 0 < shrink < 1 < grow < ∞, got {self.shrink!r} and "
                f"{self.grow!r}"
            )
        if not 0.0 <= self.min_step < self.max_step:
            raise ValueError(
                f"a controller needs 0 <= min_step < max_step, got {self.min_step!r} and "
                f"{self.max_step!r}"
            )

    def factor(
        self, ratio: float, accepted: bool, earlier: tuple[float, float] = (1.0, 1.0), *, order: int
    ) -> float:
        """Return the next step's length relative to this one's.

        Args:
            ratio: The step's error divided by what is tolerated. One that is not finite gives
                `shrink`.
            accepted: Whether the step is kept.
            earlier: Ratios of the accepted steps before it, the newest first.
            order: Of the pair.

        Returns:
            The factor.

        Example:
            >>> Controller(shrink=0.1).factor(math.inf, False, order=3)
            0.1
        """
        if not math.isfinite(ratio):
            return self.shrink
        now, before, earliest = self._exponents(order)
        newer, older = (max(e, _LEAST) for e in earlier)
        found = self.safety * max(ratio, _LEAST) ** now * newer**before * older**earliest
        return min(max(found, 1.0 if accepted else self.shrink), self.grow)

    def factor_each(
        self, ratio: Tensor, accepted: Tensor, earlier: tuple[Tensor, Tensor], *, order: int
    ) -> Tensor:
        """Return the factor of each sample, as `factor` would.

        Args:
            ratio: `[B]`.
            accepted: `[B]`, truth values.
            earlier: Each `[B]`.
            order: Of the pair.

        Returns:
            `[B]`.

        Example:
            >>> ratio, one = torch.tensor([1e9, 1.0]), torch.ones(2)
            >>> Controller().factor_each(ratio, ratio <= 1.0, (one, one), order=5)
            tensor([0.2000, 1.0000])
        """
        now, before, earliest = self._exponents(order)
        newer, older = (e.clamp_min(_LEAST) for e in earlier)
        found = self.safety * ratio.clamp_min(_LEAST) ** now * newer**before * older**earliest
        found = torch.where(ratio.isfinite(), found, self.shrink).clamp(self.shrink, self.grow)
        return torch.where(accepted, found.clamp_min(1.0), found)

    def _exponents(self, order: int) -> tuple[float, float, float]:
        i, p, d = (k / order for k in (self.integral, self.proportional, self.derivative))
        return -(i + p + d), p + 2 * d, -d
