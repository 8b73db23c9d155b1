"""Keep a part of the data as it is, and let the flow fill in the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowsolvers.context import Context, evaluate, jumps, model_rows
from flowsolvers.paths import Linear, Path
from flowsolvers.velocity import Velocity

__all__ = ["inpainted"]


@dataclass(frozen=True, eq=False)
class _Inpainted:
    velocity: Velocity
    known: Tensor
    noise: Tensor
    mask: Tensor
    path: Path
    takes_context: ClassVar[bool] = True

    def __call__(self, t: Tensor, x: Tensor, *, context: Context | None = None) -> Tensor:
        known, noise, mask = (each.to(x.dtype) for each in (self.known, self.noise, self.mask))
        seen = x + mask * (self.path.interpolate(known, noise, t) - x)
        v = evaluate(self.velocity, t, seen, context)
        own = self.path.alpha_dot(t) * known + self.path.sigma_dot(t) * noise
        return v + mask * (own.to(v.dtype) - v)

    def rows(self, context: Context | None = None) -> int:
        return model_rows(self.velocity, context)

    @property
    def jumps(self) -> tuple[float, ...]:
        return jumps(self.velocity)


def inpainted(
    velocity: Velocity, known: Tensor, noise: Tensor, mask: Tensor, *, path: Path | None = None
) -> Velocity:
    """Make a velocity that arrives at the known data where the mask is 1, and fills in the rest.

    The known part moves along its own path, from its noise to the data, so that the model sees at
    each time what is known with as much noise as the rest has; nothing has to be put back after
    steps, and any solver will do. Guidance goes inside.

    Args:
        velocity: `velocity(t, x) -> dx/dt` of the model, perhaps guided.
        known: Data, `[B, ...]`; what it holds where the mask is 0 does not matter, but is finite.
        noise: What the solve starts from, the same tensor, shaped like `known`.
        mask: 1 where the data are known, 0 where they are not, between on a soft edge; broadcasts
            with `known`.
        path: That the model was trained on; `Linear()` when None.

    Returns:
        A velocity for `solve(velocity, noise, ...)`; for a start after t=0, from
        `path.interpolate(known, noise, start)`.

    Raises:
        ValueError: The shapes do not fit.

    Source: Lugmayr et al., RePaint, arXiv 2201.09865, for the idea to renew the known part at each
        noise level; for a flow that is a velocity.

    Example:
        >>> import torch
        >>> from flowsolvers import solve
        >>> noise, known = torch.zeros(2), torch.tensor([5.0, 0.0])
        >>> velocity = inpainted(lambda t, x: x + 1, known, noise, torch.tensor([1.0, 0.0]))
        >>> solve(velocity, noise, nfe=4, solver="euler").x[0]
        tensor(5.)
    """
    try:
        fits = (known + mask).shape == known.shape == noise.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"known, noise and mask have shapes {tuple(known.shape)}, {tuple(noise.shape)} and "
            f"{tuple(mask.shape)}; noise must be like known, and mask must broadcast with it"
        )
    return _Inpainted(velocity, known, noise, mask, Linear() if path is None else path)
