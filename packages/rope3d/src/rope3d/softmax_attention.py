"""Softmax attention over dense or packed tokens, with grouped heads, and to text besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rope3d.attention_backends import GatedAttentionBackend, choose, choose_gated
from rope3d.attention_case import AttentionCase
from rope3d.gated_text import GatedText
from rope3d.learned_rope import LearnedRope
from rope3d.rope import Rope
from rope3d.rotation import apply
from rope3d.timed_rope import TimedRope

__all__ = ["attention", "case_of", "text_case_of"]


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
    scale: float | Tensor | Literal["proportional"] | None = None,
    trained_tokens: int | None = None,
    text: GatedText | None = None,
    rounded_scores: bool = False,
    backend: str | None = None,
    rotation_backend: str | None = None,
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
        scale: Factor on the scores, positive: a number; or one for each sample, `[samples]` on the
            device; None is 1 / sqrt(head_dim); "proportional" is
            sqrt(ln(L) / ln(trained_tokens) / head_dim), with L the number of keys that the sample
            attends to.
        trained_tokens: Keys per sample in training, at least 2; with "proportional" only.
        text: Attend to text besides, with the same rotated queries.
        rounded_scores: Let scores be rounded to the dtype of q where that is quicker: on some CPUs
            in bfloat16, by "products". The error is about twice that of keeping them in float32.
        backend: Who attends: "sdpa", "products", "flash-varlen", "flash-3", "flash-4", "cudnn",
            "reference" or the name of an installed one. None takes the environment variable
            ROPE3D_ATTENTION, else the fastest that serves the case (see `explain`). One that is
            named carries out the attention to the text too.
        rotation_backend: Who rotates, as in `rotate`.

    Returns:
        `[batch, tokens, heads, value_dim]`, or packed `[total_tokens, heads, value_dim]`.

    Raises:
        ValueError: Shapes, dtypes, lengths or arguments do not fit one another, the backend's name
            is not installed, or the named backend does not serve the case.
        ImportError: The named backend is installed but failed to load.

    Convention:
        Query head h reads key and value head h // (heads / kv_heads).

    Source:
        Proportional scale: Jin et al., arXiv 2306.08645, as in Lumina-Next, arXiv 2406.18583.
        There L is the padded length of the batch; here it is the sample's own.

    >>> q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    >>> attention(q, k, v, lengths=(4, 3)).shape
    torch.Size([7, 4, 8])
    """
    if (rope is None) != (positions is None):
        raise ValueError("rope and positions belong together; give both or neither")
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths and cu_seqlens say the same; give one of them")
        lengths = _lengths_of(cu_seqlens, q)
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention has it there
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if text is not None:
            text = replace(text, keys=text.keys.to(dtype), values=text.values.to(dtype))
    case = case_of(q, k, v, lengths, key_lengths, key_mask, scale, trained_tokens, rounded_scores)
    text_case = None if text is None else text_case_of(case, text)
    if rope is not None and positions is not None:
        q, k = apply(q, k, rope, positions, t=t, backend=rotation_backend)
        case = replace(case, q=q, k=k)
        text_case = None if text_case is None else replace(text_case, q=q)
    out = choose(case, backend).attend(case)
    if text is None or text_case is None:
        return out
    chosen = choose_gated(text_case, backend)
    if isinstance(chosen, GatedAttentionBackend):
        return chosen.attend_gated(text_case, text.gate, out)
    gate = text.gate.tanh()[:, None].to(out.dtype)
    return torch.addcmul(out, gate, chosen.attend(text_case))


def case_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    key_mask: Tensor | None = None,
    scale: float | Tensor | Literal["proportional"] | None = None,
    trained_tokens: int | None = None,
    rounded_scores: bool = False,
) -> AttentionCase:
    """Check that the arguments of `attention` fit one another, and put them in one form.

    Args:
        q: As in `attention`; so are the others. Keys may be dense where q is packed, with one row
            for each of the lengths.
        k: Keys.
        v: Values.
        lengths: Tokens of each sample.
        key_lengths: Keys of each sample.
        key_mask: Which keys count.
        scale: Factor on the scores.
        trained_tokens: Keys per sample in training.
        rounded_scores: Whether scores may be rounded.

    Returns:
        The case.

    Raises:
        ValueError: They do not fit.
    """
    _check_shapes(q, k, v)
    if q.ndim == 4 and (lengths is not None or key_lengths is not None):
        raise ValueError(
            f"q has shape {tuple(q.shape)}, which is dense, so lengths, key_lengths and "
            "cu_seqlens do not apply; pack to [total_tokens, heads, head_dim] or use key_mask"
        )
    if k.ndim == 3 and key_mask is not None:
        raise ValueError(
            "key_mask is for dense keys; packed ones have no padding to mask, leave the keys "
            "out and give key_lengths"
        )
    if q.ndim == 3:
        own, keys = _sample_lengths(q, k, lengths, key_lengths)
        samples = len(own)
    else:
        own, keys, samples = None, None, q.shape[0]
    if key_mask is not None and (
        key_mask.shape != k.shape[:2] or key_mask.dtype != torch.bool or keys is not None
    ):
        raise ValueError(
            f"key_mask is {key_mask.dtype} of shape {tuple(key_mask.shape)}; "
            f"expected bool {list(k.shape[:2])}, True = attend"
        )
    factor = _factor(scale, trained_tokens, k, keys, key_mask, samples)
    return AttentionCase(q, k, v, factor, own, keys, key_mask, rounded_scores)


def _sample_lengths(
    q: Tensor, k: Tensor, lengths: Sequence[int] | None, key_lengths: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Give the tokens of each sample, and the keys of each unless they are dense."""
    own = (q.shape[0],) if lengths is None else tuple(lengths)
    _check_lengths("lengths", own, q.shape[0])
    keys = None
    if k.ndim == 3:
        if key_lengths is None:
            keys = (k.shape[0],) if len(own) == 1 else own
        else:
            keys = tuple(key_lengths)
        _check_lengths("key_lengths", keys, k.shape[0])
    samples = k.shape[0] if keys is None else len(keys)
    if len(own) != samples:
        raise ValueError(
            f"lengths name {len(own)} samples and key_lengths {samples}; "
            "expected one number per sample in both, or one row of dense keys per sample"
        )
    return own, keys


def _factor(
    scale: float | Tensor | Literal["proportional"] | None,
    trained_tokens: int | None,
    k: Tensor,
    key_lengths: tuple[int, ...] | None,
    key_mask: Tensor | None,
    samples: int,
) -> float | tuple[float, ...] | Tensor:
    head_dim = k.shape[-1]
    if isinstance(scale, str) and scale == "proportional":
        if trained_tokens is None or trained_tokens < 2:
            raise ValueError(
                f"trained_tokens is {trained_tokens}; scale='proportional' needs the number of "
                "tokens per sample in training, at least 2"
            )
        trained = math.log(trained_tokens) * head_dim
        if key_mask is not None:  # known on the device only
            own = key_mask.sum(-1).clamp(min=1).to(torch.float32)
            return (own.log() / trained).sqrt()
        if key_lengths is None:
            return math.sqrt(math.log(max(1, k.shape[1])) / trained)
        factors = tuple(math.sqrt(math.log(max(1, own)) / trained) for own in key_lengths)
        return factors[0] if len(set(factors)) == 1 else factors
    if isinstance(scale, str):
        raise ValueError(f"scale is {scale!r}; expected a number, 'proportional' or None")
    if trained_tokens is not None:
        raise ValueError(
            "trained_tokens has no effect without scale='proportional'; give both or neither"
        )
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, Tensor):
        if scale.shape != (samples,) or not scale.dtype.is_floating_point:
            raise ValueError(
                f"scale is {scale.dtype} of shape {tuple(scale.shape)}; expected a number, or "
                f"floating point [{samples}], one for each sample"
            )
        return scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive number, such as head_dim ** -0.5")
    return scale


def text_case_of(case: AttentionCase, text: GatedText) -> AttentionCase:
    """Check that text fits the first attention, and give the second one.

    Args:
        case: The first attention.
        text: What to attend to besides.

    Returns:
        The case of the second attention, with the queries of the first.

    Raises:
        ValueError: They do not fit.
    """
    q, heads, value_dim = case.q, case.q.shape[-2], case.v.shape[-1]
    shapes = f"text keys {tuple(text.keys.shape)}, values {tuple(text.values.shape)}"
    if text.gate.shape != (heads,):
        raise ValueError(
            f"gate has shape {tuple(text.gate.shape)}; expected [{heads}], one number for each "
            "query head"
        )
    if text.values.shape[-1] != value_dim:
        raise ValueError(f"{shapes}: expected values of {value_dim} channels, as those of v")
    if (text.keys.ndim == 3) != (text.lengths is not None) or (case.dense and text.keys.ndim == 3):
        raise ValueError(
            f"{shapes}, lengths {text.lengths}: expected [samples, text_tokens, kv_heads, "
            "head_dim] without lengths, or for packed q [total_text_tokens, kv_heads, head_dim] "
            "with lengths"
        )
    try:
        second = case_of(q, text.keys, text.values, case.lengths, text.lengths, text.mask)
    except ValueError as error:
        raise ValueError(f"text: {error}") from error
    return replace(second, rounded_scores=case.rounded_scores)


def _lengths_of(cu_seqlens: Tensor, q: Tensor) -> list[int]:
    """Read the lengths back from the device."""
    if q.ndim != 3 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} and q has shape "
            f"{tuple(q.shape)}; expected integers [samples + 1], and q packed as "
            "[total_tokens, heads, head_dim]"
        )
    ends = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != q.shape[0] or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens are {ends}; expected numbers that begin at 0, never decrease and end at "
            f"the {q.shape[0]} tokens of q"
        )
    return lengths


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    # Shapes are written out only where something is wrong: that takes longer than the checks.
    if q.ndim not in (3, 4) or k.ndim not in (3, 4) or k.ndim < q.ndim or v.ndim != k.ndim:
        raise ValueError(
            f"{_shapes(q, k, v)}: expected all [batch, tokens, heads, head_dim] or all packed "
            "[total_tokens, heads, head_dim]; transpose [batch, heads, tokens, head_dim] first"
        )
    batches = q.ndim == 3 or q.shape[0] == k.shape[0]
    if k.shape[:-1] != v.shape[:-1] or not batches or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{_shapes(q, k, v)}: expected k and v of the same keys and heads, and q of the same "
            "batch and head_dim as k"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{_shapes(q, k, v)}: {q.shape[-2]} query heads cannot share {k.shape[-2]} key heads "
            "evenly; expected heads to be a multiple of kv_heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device} and v {v.dtype} on "
            f"{v.device}; expected one dtype and one device"
        )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_lengths(name: str, lengths: Sequence[int], total: int) -> None:
    if any(length < 0 for length in lengths) or sum(lengths) != total:
        raise ValueError(
            f"{name} are {tuple(lengths)}, which sum to {sum(lengths)}; expected numbers of at "
            f"least 0 that sum to the {total} packed tokens"
        )
