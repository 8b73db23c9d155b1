"""The rotation as others write it, each from its formula, for what they cost."""

from __future__ import annotations

import torch
from torch import Tensor


def complex_float(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply complex numbers in float32, as Lumina-T2X does.

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        turns: cos + i sin, complex64 `[tokens, pairs]`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)


def complex_double(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply complex numbers in float64, as Wan 2.1 does; the result stays float32.

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        turns: cos + i sin, complex128 `[tokens, pairs]`.
    """
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).float()


def real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Add the swapped pairs times sine, as diffusers does with `use_real`.

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        cos: float32 `[tokens, head_dim]`, each number twice.
        sin: As `cos`.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + swapped.float() * sin[:, None]).to(x.dtype)
