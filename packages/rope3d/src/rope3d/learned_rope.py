"""Layouts whose frequencies are learned, the same for all heads or each head its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rope3d.angles import cos_sin, real_dtype, turn_cos_sin
from rope3d.double_float import constant, multiply, split
from rope3d.rope import Rope
from rope3d.rotation import Pairing, Rotation

__all__ = ["LearnedRope"]

# What part of a turn a radian is.
_TURN = split(1 / (2 * math.pi))


class LearnedRope(torch.nn.Module):
    """A layout whose frequencies are a parameter; give it to `apply` like any other.

    angle[token, (head,) pair] = sum over axes of
        position[token, axis] * frequencies[(head,) axis, pair]

    Angles are computed in float64, or on MPS, which has none, in double-float arithmetic and in
    turns; autocast does not lower them. Gradients have the dtype of the parameter. Keep it float32:
    bfloat16 rounds a frequency by up to 0.4 %, an angle of 1 radian after 250 positions of the
    fastest pair.

    Args:
        rope: The layout to begin with. Where an axis turns no pair its frequency is 0 and is
            learned as the others are, so that every axis may come to turn every pair.
        heads: Key heads, each with frequencies of its own that begin the same; None shares one
            set among all heads.
        device: Where the parameter is.
        dtype: Its dtype; None is PyTorch's default.

    Attributes:
        frequencies: `[axes, pairs]`, or `[heads, axes, pairs]`; radians per unit of position.

    Raises:
        ValueError: `heads` is below 1.

    Convention:
        With grouped heads the frequencies belong to the key heads, and query head h turns as key
        head h // (query heads / key heads) does, the one that it attends to: scores then depend on
        differences of positions only.

    Source:
        Heo et al., Rotary Position Embedding for Vision Transformer, arXiv 2403.13298
        (RoPE-Mixed); there with as many key heads as query heads.

    >>> learned = LearnedRope(Rope(((1.0, 0.0), (0.0, 1.0))), heads=3)
    >>> learned.rotation(torch.zeros(5, 2)).cos.shape
    torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        rope: Rope,
        heads: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads is not None and heads < 1:
            raise ValueError(f"heads is {heads}; expected at least 1, or None to share one set")
        self._first = rope
        rows = torch.tensor(rope.frequencies, device=device, dtype=dtype)
        rows = rows if heads is None else rows.repeat(heads, 1, 1)
        self.frequencies = torch.nn.Parameter(rows)

    @classmethod
    def mixed(
        cls,
        head_dim: int,
        heads: int,
        *,
        generator: torch.Generator,
        base: float = 10.0,
        pairing: Pairing = "interleaved",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LearnedRope:
        """Begin with a random direction in the image for each head, as rope-vit does.

        Pair k < n and pair n + k, n = head_dim / 4, turn by base^(-4k / head_dim) per position,
        the first along the direction of the head and the second across it.

        Args:
            head_dim: Channels of a head; a multiple of 4.
            heads: Key heads, at least 1.
            generator: Draws the directions, on the CPU, uniformly.
            base: Base of the geometric series of frequencies; positive.
            pairing: Which channels form a pair, as in `Rope`.
            device: Where the parameter is.
            dtype: Its dtype; None is PyTorch's default.

        Returns:
            A layout of 2 axes (row, column).

        Raises:
            ValueError: `head_dim` is not a positive multiple of 4, `heads` is below 1, or `base`
                is not positive.

        Source:
            naver-ai/rope-vit, `init_random_2d_freqs`, which names the column first.

        >>> generator = torch.Generator().manual_seed(0)
        >>> LearnedRope.mixed(8, 3, generator=generator).frequencies.shape
        torch.Size([3, 2, 4])
        """
        if head_dim <= 0 or head_dim % 4 or not base > 0:
            raise ValueError(
                f"head_dim is {head_dim} and base {base}; expected a positive multiple of 4 and a "
                "positive number, such as 64 and 10.0"
            )
        speeds = [base ** (-4 * k / head_dim) for k in range(head_dim // 4)]
        still = (0.0,) * (2 * len(speeds))
        learned = cls(Rope((still, still), pairing=pairing), heads, device=device, dtype=dtype)
        direction = 2 * math.pi * torch.rand(heads, 1, generator=generator, dtype=torch.float64)
        direction = torch.cat((direction, direction + math.pi / 2), dim=-1)
        speed = torch.tensor(speeds, dtype=torch.float64)
        row, column = (
            (part.unsqueeze(-1) * speed).flatten(1) for part in (direction.sin(), direction.cos())
        )
        with torch.no_grad():
            learned.frequencies.copy_(torch.stack((row, column), dim=1))
        return learned

    @property
    def axes(self) -> int:
        """How many columns the positions must have."""
        return self._first.axes

    @property
    def heads(self) -> int | None:
        """Key heads with frequencies of their own, or None if all share one set."""
        return self.frequencies.shape[0] if self.frequencies.ndim == 3 else None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self._first.head_dim

    @property
    def pairing(self) -> Pairing:
        """Which channels form a pair."""
        return self._first.pairing

    def rotation(self, positions: Tensor, t: Tensor | float | None = None) -> Rotation:
        """Turn positions into the cosine and sine of each pair's angle.

        Differentiable in the frequencies and in the positions.

        Args:
            positions: `[..., tokens, axes]`, any real dtype; fractions are allowed.
            t: Ignored, so that a caller need not know whether a layout follows the timestep.

        Returns:
            The rotation, `[..., tokens, pairs]`, or with heads `[..., tokens, heads, pairs]`.

        Raises:
            ValueError: `positions` does not end in `[tokens, axes]`.
        """
        self._first.check_positions(positions)
        per_head = self.heads is not None
        if per_head:
            positions = positions.unsqueeze(-2)  # the same for every head
        dtype = real_dtype(positions.device)
        rows = self.frequencies.to(dtype)
        if dtype == torch.float64:
            cos, sin = cos_sin(positions, rows.unbind(-2))
        else:
            high, low = multiply((rows, torch.zeros_like(rows)), constant(_TURN, rows))
            cos, sin = turn_cos_sin(positions, high.unbind(-2), low.unbind(-2))
        return Rotation(cos, sin, self.pairing, self._first.untouched, per_head)

    def forward(self, positions: Tensor, t: Tensor | float | None = None) -> Rotation:
        """Do what `rotation` does, for hooks and wrappers that act on the call of a module."""
        return self.rotation(positions, t)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"head_dim={self.head_dim}, axes={self.axes}, heads={self.heads}"
