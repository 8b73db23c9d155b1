"""Guidance: functions from velocities to a velocity."""

from __future__ import annotations

import math

from torch import Tensor

from flowsolvers.velocity import Velocity

__all__ = ["guided"]


def guided(cond: Velocity, uncond: Velocity, *, scale: float) -> Velocity:
    """Guide without a classifier, v = u + s·(c - u).

    Args:
        cond: Velocity c under the condition.
        uncond: Velocity u without it, or under a negative one.
        scale: s, finite; 0 is `uncond`, 1 is `cond`, above 1 exaggerates the condition.

    Returns:
        A velocity that calls `uncond`, then `cond`, once each. `Solution.nfe` counts the pair
        as one evaluation.

    Raises:
        ValueError: `scale` is not finite; or, when called, c and u differ in shape.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598, with the scale
        counted from the unconditional velocity (their w is s - 1).

    Example:
        >>> import torch
        >>> v = guided(lambda t, x: 3 * x, lambda t, x: x, scale=4.0)
        >>> v(torch.tensor(0.5), torch.ones(2))
        tensor([9., 9.])
    """
    if not math.isfinite(scale):
        raise ValueError(f"the guidance scale must be finite, got {scale!r}")

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        u, c = uncond(t, x), cond(t, x)
        if u.shape != c.shape:
            raise ValueError(
                f"the conditional velocity has shape {tuple(c.shape)}, the unconditional one "
                f"{tuple(u.shape)}; they must be the same"
            )
        return u + scale * (c - u)

    return velocity
