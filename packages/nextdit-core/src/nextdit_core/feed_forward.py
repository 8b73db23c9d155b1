"""The feed-forward layer of a block."""

from __future__ import annotations

from torch import Tensor, nn

from nextdit_core.block_operations import swiglu
from nextdit_core.eager_cpu import linear

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """SwiGLU: w2( silu(w1 x) · w3 x ), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape."""
        return linear(self.w2, swiglu(linear(self.w1, x), linear(self.w3, x)))
