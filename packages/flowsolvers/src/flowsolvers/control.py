"""How long the next step is, given how large the error of this one was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Controller"]

#: Error ratios below this count as this, so that the next step stays finite.
_LEAST = 1e-30

_Number = TypeVar("_Number", float, Tensor)


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
        min_step: A step this short is accepted whatever its error, and none is shorter, but to
            land on an end or a jump; 0 for none such.
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
        self,
        ratio: _Number,
        accepted: bool | Tensor,
        earlier: tuple[_Number, _Number] | None = None,
        *,
        order: int,
    ) -> _Number:
        """Return the next step's length relative to this one's.

        Args:
            ratio: The step's error divided by what is tolerated: a number, or `[B]` for samples
                that each have their own step. One that is not finite gives `shrink`.
            accepted: Whether the step is kept; `[B]` with a ratio for each sample.
            earlier: Ratios of the accepted steps before it, the newest first; 1 when None.
            order: Of the pair.

        Returns:
            The factor, shaped like the ratio.

        Example:
            >>> Controller().factor(torch.tensor([1e9, 1.0]), torch.tensor([False, True]), order=5)
            tensor([0.2000, 1.0000])
        """
        i, p, d = (k / order for k in (self.integral, self.proportional, self.derivative))
        if isinstance(ratio, Tensor):
            found = self.safety * ratio.clamp_min(_LEAST) ** -(i + p + d)
            if earlier is not None and (p or d):
                found = found * earlier[0].clamp_min(_LEAST) ** (p + 2 * d)
                found = found * earlier[1].clamp_min(_LEAST) ** -d
            found = torch.where(ratio.isfinite(), found, self.shrink)
            found = found.clamp(self.shrink, self.grow)
            return torch.where(torch.as_tensor(accepted), found.clamp_min(1.0), found)
        if not math.isfinite(ratio):
            return self.shrink
        found = self.safety * max(ratio, _LEAST) ** -(i + p + d)
        if earlier is not None and (p or d):
            newer, older = (max(cast("float", e), _LEAST) for e in earlier)
            found *= newer ** (p + 2 * d) * older**-d
        return min(max(found, 1.0 if accepted else self.shrink), self.grow)
