"""Softmax attention over dense or packed tokens, with grouped heads and proportional scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rope3d.learned_rope import LearnedRope
from rope3d.rope import Rope
from rope3d.rotation import apply
from rope3d.timed_rope import TimedRope

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | TimedRope | LearnedRope | None = None,
    positions: Tensor | None = None,
    *,
    t: Tensor | float | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | Literal["proportional"] | None = None,
    trained_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from every query to all keys of its own sample.

    out = softmax(scale * q k^T) v

    Tensors are dense, one row per sample, or packed, one sample after another without padding.
    Each key and value head serves heads / kv_heads neighbouring query heads and is not repeated
    in memory. A query that has no key to attend to gets 0.

    Args:
        q: Dense `[batch, tokens, heads, head_dim]`, or packed `[total_tokens, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`, or packed `[total_keys, kv_heads, head_dim]`.
        v: `[batch, keys, kv_heads, value_dim]`, or packed `[total_keys, kv_heads, value_dim]`.
        rope: Rotate q and k by their positions first; needs `positions`.
        positions: `[tokens, axes]` or `[batch, tokens, axes]`; packed `[total_tokens, axes]`.
        t: Timesteps for a `TimedRope`, as in `apply`: one number, `[batch]`, or packed
            `[total_tokens]`.
        lengths: Packed only: tokens of each sample, numbers on the host, 0 allowed; None is one
            sample.
        key_lengths: Packed only: keys of each sample, where they are not `lengths`.
        cu_seqlens: Packed only, instead of `lengths`: `[samples + 1]` integers, as `pack` returns
            them. They are read back to the host, which waits for the device once per call and
            does not compile; prefer `lengths`.
        key_mask: Dense only: `[batch, keys]` bool, True = attend.
        scale: Factor on the scores; None is 1 / sqrt(head_dim); "proportional" is
            sqrt(ln(L) / ln(trained_tokens) / head_dim), with L the number of keys that the sample
            attends to.
        trained_tokens: Keys per sample in training, at least 2; with "proportional" only.
        backend: Who rotates, as in `rotate`.

    Returns:
        `[batch, tokens, heads, value_dim]`, or packed `[total_tokens, heads, value_dim]`.

    Raises:
        ValueError: Shapes, lengths or arguments do not fit one another.
        ImportError: As in `rotate`.

    Convention:
        Query head h reads key and value head h // (heads / kv_heads).

    Source:
        Proportional scale: Jin et al., arXiv 2306.08645, as in Lumina-Next, arXiv 2406.18583.
        There L is the padded length of the batch; here it is the sample's own.

    >>> q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    >>> attention(q, k, v, lengths=(4, 3)).shape
    torch.Size([7, 4, 8])
    """
    _check_shapes(q, k, v)
    if scale == "proportional":
        if trained_tokens is None or trained_tokens < 2:
            raise ValueError(
                f"trained_tokens is {trained_tokens}; scale='proportional' needs the number of "
                "tokens per sample in training, at least 2"
            )
    elif isinstance(scale, str):
        raise ValueError(f"scale is {scale!r}; expected a number, 'proportional' or None")
    elif trained_tokens is not None:
        raise ValueError(
            "trained_tokens has no effect without scale='proportional'; give both or neither"
        )
    if (rope is None) != (positions is None):
        raise ValueError("rope and positions belong together; give both or neither")
    if rope is not None and positions is not None:
        q, k = apply(q, k, rope, positions, t=t, backend=backend)
    if q.ndim == 4:
        if lengths is not None or key_lengths is not None or cu_seqlens is not None:
            raise ValueError(
                f"q has shape {tuple(q.shape)}, which is dense, so lengths, key_lengths and "
                "cu_seqlens do not apply; pack to [total_tokens, heads, head_dim] or use key_mask"
            )
        return _dense(q, k, v, key_mask, scale, trained_tokens)
    if key_mask is not None:
        raise ValueError(
            "key_mask is for dense tensors; packed ones have no padding to mask, leave the keys "
            "out and give key_lengths"
        )
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths and cu_seqlens say the same; give one of them")
        lengths = cu_seqlens.diff().tolist()
    if lengths is None:
        lengths = (q.shape[0],)
        key_lengths = (k.shape[0],) if key_lengths is None else key_lengths
    elif key_lengths is None:
        key_lengths = lengths
    return _packed(q, k, v, lengths, key_lengths, scale, trained_tokens)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float | Literal["proportional"] | None,
    trained_tokens: int | None,
) -> Tensor:
    _check_lengths("lengths", lengths, q.shape[0])
    _check_lengths("key_lengths", key_lengths, k.shape[0])
    if len(lengths) != len(key_lengths):
        raise ValueError(
            f"lengths name {len(lengths)} samples and key_lengths {len(key_lengths)}; "
            "expected one number per sample in both"
        )
    parts = [q.new_zeros(0, q.shape[1], v.shape[2])]
    first, first_key = 0, 0
    # Neighbours of equal size are one dense batch, so equal lengths cost a single call.
    for (tokens, keys), run in groupby(zip(lengths, key_lengths, strict=True)):
        samples = len(list(run))
        last, last_key = first + samples * tokens, first_key + samples * keys
        out = _dense(
            q[first:last].unflatten(0, (samples, tokens)),
            k[first_key:last_key].unflatten(0, (samples, keys)),
            v[first_key:last_key].unflatten(0, (samples, keys)),
            None,
            scale,
            trained_tokens,
        )
        parts.append(out.flatten(0, 1))
        first, first_key = last, last_key
    return torch.cat(parts)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float | Literal["proportional"] | None,
    trained_tokens: int | None,
) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if key_mask is not None and (key_mask.shape != (batch, keys) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}; "
            f"expected bool [{batch}, {keys}], True = attend"
        )
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(batch, tokens, heads, v.shape[-1])
    factor = None if isinstance(scale, str) else scale
    if scale == "proportional" and trained_tokens is not None:
        if key_mask is None:
            factor = math.sqrt(math.log(keys) / math.log(trained_tokens) / head_dim)
        else:  # each sample has its own factor, known on the device only: it goes on the queries
            own = key_mask.sum(-1).clamp(min=1).to(torch.float32)
            growth = (own.log() / math.log(trained_tokens)).sqrt()[:, None, None, None]
            q = (q * growth).to(q.dtype)
    mask = alive = None
    if key_mask is not None:
        alive = key_mask.any(-1, keepdim=True)
        mask = (key_mask | ~alive)[:, None, None]  # softmax over no key at all would be NaN
    # There is no causal order, so the query heads that share a key head can stand one after
    # another along the tokens. K and V are then never repeated, with any kernel of PyTorch's.
    group = heads // kv_heads
    grouped = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=factor
    )
    out = out.unflatten(2, (group, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out if alive is None else out.masked_fill(~alive[:, :, None, None], 0.0)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim not in (3, 4) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(
            f"{shapes}: expected all [batch, tokens, heads, head_dim] or all packed "
            "[total_tokens, heads, head_dim]; transpose [batch, heads, tokens, head_dim] first"
        )
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{shapes}: expected k and v of the same keys and heads, and q of the same batch and "
            "head_dim as k"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{shapes}: {q.shape[-2]} query heads cannot share {k.shape[-2]} key heads evenly; "
            "expected heads to be a multiple of kv_heads"
        )


def _check_lengths(name: str, lengths: Sequence[int], total: int) -> None:
    if any(length < 0 for length in lengths) or sum(lengths) != total:
        raise ValueError(
            f"{name} are {tuple(lengths)}, which sum to {sum(lengths)}; expected numbers of at "
            f"least 0 that sum to the {total} packed tokens"
        )
