"""Rotation: turn the pairs of queries and keys by the angles of their positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rope3d.backends import Backend, WritingBackend, choose
from rope3d.overlap import meet, repeats
from rope3d.reference import Reference, as_complex

if TYPE_CHECKING:
    from rope3d.learned_rope import LearnedRope
    from rope3d.rope import Rope
    from rope3d.timed_rope import TimedRope

__all__ = ["Pairing", "Rotation", "apply", "rotate"]

Pairing = Literal["interleaved", "half"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """The angle of every pair of every token, as its cosine and sine.

    Compute it once per set of positions with `Rope.rotation` and use it in every layer. Do not
    write to the two tensors afterwards: what is made of them is kept.

    Args:
        cos: `[..., tokens, pairs]`, or with `per_head` `[..., tokens, heads, pairs]`; float32.
        sin: Same shape and dtype.
        pairing: Which channels form a pair, as in `Rope`.
        untouched: Channels at the end of a head that belong to no pair.
        per_head: Whether each key head has its own angles, as in `LearnedRope`.

    Raises:
        ValueError: The two differ in shape, or have fewer than 2 dimensions (3 with `per_head`).
    """

    cos: Tensor
    sin: Tensor
    pairing: Pairing = "interleaved"
    untouched: int = 0
    per_head: bool = False

    def __post_init__(self) -> None:
        """Check that cosine and sine belong together."""
        if self.cos.shape != self.sin.shape or self.cos.ndim < 2 + self.per_head:
            form = "[..., tokens, heads, pairs]" if self.per_head else "[..., tokens, pairs]"
            raise ValueError(
                f"cos has shape {tuple(self.cos.shape)} and sin {tuple(self.sin.shape)}; "
                f"expected both {form}"
            )

    @cached_property
    def _kept_turns(self) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor could not serve a later backward
            return as_complex(self.cos, self.sin, torch.float32)

    def _turns(self, q: Tensor) -> Tensor | None:
        """Give cos + i sin, kept for later layers and steps, where eager tensors on the CPU use it.

        None where they do not, or where gradients or torch.func need cosine and sine themselves.
        """
        plain = type(q) is Tensor and type(self.cos) is type(self.sin) is Tensor
        if q.device.type != "cpu" or not plain or torch.compiler.is_compiling():
            return None
        if self.cos.requires_grad or self.sin.requires_grad or self.cos.dtype != torch.float32:
            return None
        # Under torch.func whatever is computed belongs to the transform, and dies with it.
        return self._kept_turns if torch._C._functorch.maybe_current_level() is None else None


def rotate(
    q: Tensor,
    k: Tensor,
    rotation: Rotation,
    *,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, pair of channels by pair.

    y[a] = x[a] cos - x[b] sin;  y[b] = x[a] sin + x[b] cos

    The arithmetic is float32 (float64 for float64 inputs); the result has the input's dtype.
    Inputs may have any strides and are left unchanged, unless in place.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        rotation: `[tokens, pairs]`, or `[batch, tokens, pairs]` for positions that differ
            between samples; with `per_head` also the heads of k before the pairs, each shared by
            heads of q / heads of k neighbours. head_dim is 2 * pairs + untouched.
        inplace: Write the result into q and k and return them. Where no gradient is recorded, a
            backend that can write needs little memory beside them (the reference goes block by
            block); elsewhere the result is copied into them. Where gradients are recorded, slice
            q and k out of a projection: PyTorch refuses to write into parts that `split` made.
        backend: Name of an installed backend. None takes the environment variable
            ROPE3D_BACKEND, else the fastest one that serves these tensors (see `explain`). Only
            the reference turns each head by itself, or computes gradients of cosine and sine.

    Returns:
        The rotated `(q, k)`, same shapes and dtypes.

    Raises:
        ValueError: Shapes do not fit one another, the backend's name is not installed, the
            named backend cannot serve these tensors or this rotation, or in place q or k is a
            leaf that requires a gradient, repeats an element, or shares one with the other.
        ImportError: The named backend is installed but failed to load.

    Convention:
        Pair m is channels (a, b) = (2m, 2m + 1) if interleaved, (m, m + pairs) if half-split.
        Positive angles turn a towards b: (1, 0) at angle pi/2 becomes (0, 1).

    >>> import torch
    >>> quarter = Rotation(torch.zeros(1, 1), torch.ones(1, 1))
    >>> x = torch.tensor([[[1.0, 0.0]]])  # one token, one head, one pair
    >>> rotate(x, x, quarter)[0]
    tensor([[[0., 1.]]])
    """
    _check(q, k, rotation)
    if inplace:
        _check_writable(q, k)
    width = 2 * rotation.cos.shape[-1]
    own_q, own_k = (q, k) if not rotation.untouched else (q[..., :width], k[..., :width])
    chosen = choose(own_q, own_k, backend, reference_only=_reference_only(rotation))
    own_q, own_k = _grouped(own_q, rotation), _grouped(own_k, rotation)
    if inplace:
        _write(chosen, own_q, own_k, rotation)
        return q, k
    own_q, own_k = _turned(chosen, own_q, own_k, rotation)
    if rotation.per_head:
        own_q, own_k = own_q.flatten(-3, -2), own_k.flatten(-3, -2)
    if rotation.untouched:
        own_q = torch.cat((own_q, q[..., width:]), dim=-1)
        own_k = torch.cat((own_k, k[..., width:]), dim=-1)
    return own_q, own_k


def _grouped(x: Tensor, rotation: Rotation) -> Tensor:
    """Make the heads that share a key head a dimension, along which its angles repeat."""
    if not rotation.per_head:
        return x
    heads = rotation.cos.shape[-2]
    return x.unflatten(-2, (heads, x.shape[-2] // heads))


def _reference_only(rotation: Rotation) -> str | None:
    """Say why backends other than the reference, which know one constant table, do not serve."""
    if rotation.per_head:
        return "each head has its own angles, which only the backend 'reference' knows"
    if torch.is_grad_enabled() and (rotation.cos.requires_grad or rotation.sin.requires_grad):
        return (
            "cosine or sine requires a gradient, which only the backend 'reference' computes; "
            "detach the positions and frequencies if they are not learned"
        )
    return None


def _turned(chosen: Backend, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    cos, sin = rotation.cos, rotation.sin
    if rotation.pairing == "interleaved":
        if isinstance(chosen, Reference):
            return chosen.rotate(q, k, cos, sin, rotation._turns(q))
        return chosen.rotate(q, k, cos, sin)
    if isinstance(chosen, Reference):
        return chosen.rotate_half(q, k, cos, sin)
    # Backends know adjacent pairs only: bring the halves together, and apart again.
    q, k = chosen.rotate(_adjacent(q), _adjacent(k), cos, sin)
    return _halves(q), _halves(k)


def _write(chosen: Backend, q: Tensor, k: Tensor, rotation: Rotation) -> None:
    cos, sin = rotation.cos, rotation.sin
    learns = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    records = learns or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    # Under torch.compile a copy is fused with what it copies.
    if not records and not torch.compiler.is_compiling():
        if isinstance(chosen, Reference) and rotation.pairing == "half":
            chosen.rotate_half_(q, k, cos, sin)
            return
        if isinstance(chosen, Reference):
            chosen.rotate_(q, k, cos, sin, rotation._turns(q))
            return
        if isinstance(chosen, WritingBackend) and rotation.pairing == "interleaved":
            chosen.rotate_(q, k, cos, sin)
            return
    # The gradient of cosine and sine needs q and k as they were.
    before = (q.clone(), k.clone()) if learns else (q, k)
    for x, turned in zip((q, k), _turned(chosen, *before, rotation), strict=True):
        x.copy_(turned)


def _adjacent(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def apply(
    q: Tensor,
    k: Tensor,
    rope: Rope | TimedRope | LearnedRope,
    positions: Tensor,
    *,
    t: Tensor | float | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions: `rotate(q, k, rope.rotation(positions, t))`.

    Args:
        q: `[batch, tokens, heads, head_dim]`, or packed `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        rope: The layout, of the same head_dim.
        positions: `[tokens, axes]` or `[batch, tokens, axes]`.
        t: Timesteps in [0, 1], 0 = noise, for a `TimedRope`: one number, `[batch]`, or packed
            `[tokens]`.
        inplace: As in `rotate`.
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
    if isinstance(t, Tensor) and t.ndim and q.ndim == 4 and positions.ndim == 2:
        positions = positions.unsqueeze(0)  # the samples share their positions, not their times
    return rotate(q, k, rope.rotation(positions, t), inplace=inplace, backend=backend)


def _check(q: Tensor, k: Tensor, rotation: Rotation) -> None:
    cos, channels = rotation.cos, 2 * rotation.cos.shape[-1] + rotation.untouched
    if rotation.per_head:
        _check_heads(q, k, cos)
        cos = cos.select(-2, 0)
    # Shapes are written out only where something is wrong: that takes longer than the checks.
    if q.ndim not in (3, 4) or k.ndim != q.ndim:
        raise ValueError(
            f"{_shapes(q, k, cos)}: expected q and k both [batch, tokens, heads, head_dim] or both "
            "[tokens, heads, head_dim]; transpose [batch, heads, tokens, head_dim] first"
        )
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{_shapes(q, k, cos)}: q and k may differ only in the number of heads")
    if q.shape[-1] != channels:
        raise ValueError(
            f"{_shapes(q, k, cos)}: head_dim is {q.shape[-1]} but the rotation turns "
            f"{cos.shape[-1]} pairs of a head of {channels} channels; build the layout with "
            f"head_dim={q.shape[-1]}"
        )
    tokens, own = q.shape[-3], cos.ndim > 2  # own: each sample has its rotation
    # Sizes may be symbols under torch.compile, which `in` does not compare by value.
    if cos.shape[-2] != tokens or (
        own and (cos.ndim != q.ndim - 1 or (cos.shape[0] != 1 and cos.shape[0] != q.shape[0]))
    ):
        raise ValueError(
            f"{_shapes(q, k, cos)}: the rotation must cover the {tokens} tokens of q, as "
            "[tokens, pairs] or, for dense q, [batch, tokens, pairs]; use as many positions as "
            "there are tokens"
        )


def _shapes(q: Tensor, k: Tensor, cos: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, rotation {tuple(cos.shape)}"


def _check_heads(q: Tensor, k: Tensor, cos: Tensor) -> None:
    heads = cos.shape[-2]
    if heads != k.shape[-2] or heads == 0 or q.shape[-2] % heads:
        raise ValueError(
            f"q has {q.shape[-2]} heads, k {k.shape[-2]} and the rotation {heads}; expected as "
            "many in the rotation as in k, and a multiple of them in q"
        )


def _check_writable(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError(
                f"{name} is a leaf that requires a gradient, which is the one of its value before "
                "the rotation; rotate out of place, or under torch.no_grad()"
            )
    if q is k:
        raise ValueError("q and k are one tensor, which would be rotated twice; clone one of them")
    if torch.compiler.is_compiling():
        return  # there are no addresses to look at
    for name, x in (("q", q), ("k", k)):
        if repeats(x):
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and strides {x.stride()} has elements that "
                "share memory and cannot be written apart; clone it or rotate out of place"
            )
    if meet(q, k):
        raise ValueError(
            "q and k share elements, which would be rotated twice; clone one of them or rotate "
            "out of place"
        )
