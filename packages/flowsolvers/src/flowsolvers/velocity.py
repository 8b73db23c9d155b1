"""What every part of this package takes for a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

__all__ = ["Velocity"]

#: `velocity(t, x) -> dx/dt`: t a 0-dim tensor in [0, 1], 0 = noise and 1 = data; x and the
#: result of one shape. For the linear path x_t = (1 - t)·noise + t·data it is data - noise.
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
