"""Rotation: turn the pairs of queries and keys by the angles of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rope3d.backends import choose

if TYPE_CHECKING:
    from rope3d.layouts import Rope

__all__ = ["Rotation", "apply", "rotate"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The angle of every pair of every token, as its cosine and sine.

    Compute it once per set of positions with `Rope.rotation` and use it in every layer.

    Args:
        cos: `[..., tokens, pairs]`, float32.
        sin: Same shape and dtype.

    Raises:
        ValueError: The two differ in shape, or have fewer than 2 dimensions.
    """

    cos: Tensor
    sin: Tensor

    def __post_init__(self) -> None:
        """Check that cosine and sine belong together."""
        if self.cos.shape != self.sin.shape or self.cos.ndim < 2:
            raise ValueError(
                f"cos has shape {tuple(self.cos.shape)} and sin {tuple(self.sin.shape)}; "
                "expected both [..., tokens, pairs]"
            )


def rotate(
    q: Tensor, k: Tensor, rotation: Rotation, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, pair of channels by pair.

    y[2m] = x[2m] cos - x[2m+1] sin;  y[2m+1] = x[2m] sin + x[2m+1] cos

    The arithmetic is float32 (float64 for float64 inputs); the result has the input's dtype.
    Inputs are left unchanged and may have any strides.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        rotation: `[tokens, pairs]`, or `[batch, tokens, pairs]` for positions that differ
            between samples; head_dim is 2 * pairs.
        backend: Name of an installed backend. None takes the environment variable
            ROPE3D_BACKEND, else the fastest one that serves these tensors (see `explain`).

    Returns:
        The rotated `(q, k)`, same shapes and dtypes.

    Raises:
        ValueError: Shapes do not fit one another, the backend's name is not installed, or the
            named backend cannot serve these tensors.
        ImportError: The named backend is installed but failed to load.

    Convention:
        Adjacent channels form a pair; positive angles turn channel 2m towards channel 2m + 1:
        (1, 0) at angle pi/2 becomes (0, 1).

    >>> import torch
    >>> quarter = Rotation(torch.zeros(1, 1), torch.ones(1, 1))
    >>> x = torch.tensor([[[1.0, 0.0]]])  # one token, one head, one pair
    >>> rotate(x, x, quarter)[0]
    tensor([[[0., 1.]]])
    """
    _check(q, k, rotation.cos)
    return choose(q, k, backend).rotate(q, k, rotation.cos, rotation.sin)


def apply(
    q: Tensor, k: Tensor, rope: Rope, positions: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions: `rotate(q, k, rope.rotation(positions))`.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        rope: The layout, of the same head_dim.
        positions: `[tokens, axes]` or `[batch, tokens, axes]`.
        backend: As in `rotate`.

    Returns:
        The rotated `(q, k)`, same shapes and dtypes.

    Raises:
        ValueError: As in `Rope.rotation` and `rotate`.
        ImportError: As in `rotate`.

    >>> import rope3d, torch
    >>> q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    >>> q, k = apply(q, k, rope3d.lumina(8), rope3d.grid(height=2, width=3))
    >>> q.shape, k.shape
    (torch.Size([1, 6, 4, 8]), torch.Size([1, 6, 2, 8]))
    """
    return rotate(q, k, rope.rotation(positions), backend=backend)


def _check(q: Tensor, k: Tensor, cos: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, rotation {tuple(cos.shape)}"
    if q.ndim not in (3, 4) or k.ndim != q.ndim:
        raise ValueError(
            f"{shapes}: expected q and k both [batch, tokens, heads, head_dim] or both "
            "[tokens, heads, head_dim]; transpose [batch, heads, tokens, head_dim] first"
        )
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: q and k may differ only in the number of heads")
    if q.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"{shapes}: head_dim is {q.shape[-1]} but the rotation turns {cos.shape[-1]} pairs "
            f"= {2 * cos.shape[-1]} channels; build the layout with head_dim={q.shape[-1]}"
        )
    tokens, batch = q.shape[-3], q.shape[:-3]
    if cos.shape[-2] != tokens or (
        cos.ndim > 2 and (cos.ndim != q.ndim - 1 or cos.shape[0] not in (1, *batch))
    ):
        raise ValueError(
            f"{shapes}: the rotation must cover the {tokens} tokens of q, as [tokens, pairs] or, "
            "for dense q, [batch, tokens, pairs]; use as many positions as there are tokens"
        )
