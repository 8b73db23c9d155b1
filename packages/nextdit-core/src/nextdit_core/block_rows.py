"""The PyTorch form of norms and gates on the CPU, some rows at a time, where nothing is recorded.

A chain of operations on whole hidden tensors goes through memory once for each, and most results
are new memory that the system has to map first. Here the rows of one block go through the whole
chain while they are in the cache. The arithmetic is float32 up to the one rounding of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextdit_core.eager_cpu import unobserved

__all__ = ["gate_residual", "norm_modulate", "serves"]

# Elements of a block, for one thread: 0.5 MiB of float32.
_BLOCK = 2**17


def serves(x: Tensor, *others: Tensor) -> bool:
    """Tell whether the functions of this module may be called.

    Args:
        x: The hidden tensor.
        *others: What else the operation takes.

    Returns:
        Whether x is large enough, all have its dtype, and nobody looks at what is done to them.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols
        return False
    if x.ndim != 3 or x.numel() < 2 * _BLOCK or any(one.dtype != x.dtype for one in others):
        return False
    return unobserved(x, *others)


def norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Compute what `nextdit_core.block_operations.norm_modulate` documents, not centred."""
    factor = weight.to(_wide(x)) * (1 + scale.to(_wide(x)))
    return _normed(x, factor, eps, None)


def gate_residual(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float) -> Tensor:
    """Compute what `nextdit_core.block_operations.gate_residual` documents."""
    factor = weight.to(_wide(x)) * gate.to(_wide(x)).tanh()
    return _normed(y, factor, eps, x)


def _normed(x: Tensor, factor: Tensor, eps: float, added: Tensor | None) -> Tensor:
    """Give RMS(x) · factor + added."""
    batch, tokens, width = x.shape
    out = x.new_empty(x.shape)
    rows = max(1, min(tokens, _BLOCK * torch.get_num_threads() // width))
    narrow = x.dtype != factor.dtype
    scratch = factor.new_empty(rows, width) if narrow else None
    for sample in range(batch):
        own = factor[sample if factor.shape[0] > 1 else 0]
        for begin in range(0, tokens, rows):
            place = slice(begin, begin + rows)
            block, result = x[sample, place], out[sample, place]
            # Where the results are float32 themselves, they are the place to compute in.
            wide = result
            if scratch is not None:
                wide = block = scratch[: len(result)].copy_(block)
            mean_square = (
                torch.linalg.vector_norm(block, dim=-1, keepdim=True).square_().div_(width)
            )
            torch.mul(block, mean_square.add_(eps).rsqrt_(), out=wide)
            wide.mul_(own if len(own) == 1 else own[place])
            if added is not None:
                wide.add_(added[sample, place])
            if narrow:
                result.copy_(wide)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
