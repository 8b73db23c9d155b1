"""Attention with PyTorch's own kernels: its choice among them, and cuDNN by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rope3d.attention_case import AttentionCase

__all__ = ["CUDNN", "SDPA", "Cudnn", "Sdpa", "attend_in_runs", "attend_with_sdpa"]

# Attend to dense keys: q, k, v, mask and scale.
_Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Sdpa:
    """Call `scaled_dot_product_attention`, once for each run of samples of equal size."""

    name: str = "sdpa"

    def why_not(self, case: AttentionCase) -> str | None:
        """Refuse only tensors that hold no real floating-point numbers."""
        if case.q.dtype.is_floating_point:
            return None
        return f"q is {case.q.dtype}; attention needs floating point"

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend densely, or run by run."""
        return attend_in_runs(case, attend_with_sdpa)


@dataclass(frozen=True)
class Cudnn:
    """Call `scaled_dot_product_attention` and have it use cuDNN."""

    name: str = "cudnn"

    def why_not(self, case: AttentionCase) -> str | None:
        """Ask PyTorch whether cuDNN takes these tensors."""
        if case.q.device.type != "cuda":
            return f"q is on {case.q.device.type}; cuDNN needs cuda"
        if not case.dense or case.key_mask is not None:
            return "it is asked for dense tensors without a mask only"
        if case.q.dtype not in (torch.bfloat16, torch.float16):
            return f"q is {case.q.dtype}; cuDNN takes bfloat16 and float16"
        if case.q.numel() == 0 or case.k.numel() == 0:
            return "there is nothing to attend to"
        parameters = torch.backends.cuda.SDPAParams(
            case.q.transpose(1, 2),
            case.k.transpose(1, 2),
            case.v.transpose(1, 2),
            None,
            0.0,
            False,
            case.q.shape[2] != case.k.shape[2],
        )
        if not torch.backends.cuda.can_use_cudnn_attention(parameters):
            return "PyTorch says that cuDNN does not serve these tensors"
        return None

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend densely."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, scale = case.scaled_queries()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _native(q, case.k, case.v, None, scale)


def attend_in_runs(case: AttentionCase, attend: _Dense) -> Tensor:
    """Attend with a function for dense tensors, once for each run of samples of equal size.

    Args:
        case: What to carry out.
        attend: Takes q `[samples, tokens, heads, head_dim]`, k and v with at least one key, a mask
            `[samples, 1, 1, keys]` bool with at least one True in each row or None, and the factor
            on the scores; gives `[samples, tokens, heads, value_dim]`.

    Returns:
        As q, with the last size of v.
    """
    if case.dense:
        q, scale = case.scaled_queries()
        return _dense(attend, q, case.k, case.v, case.key_mask, scale)
    assert case.lengths is not None
    if isinstance(case.scale, Tensor):
        q, common = case.scaled_queries()
    else:
        q, common = case.q, case.scale
    parts: list[Tensor] = []
    first, first_key = 0, 0
    for begin, end in case.runs:
        samples, tokens = end - begin, case.lengths[begin]
        last = first + samples * tokens
        if case.key_lengths is None:
            k, v = case.k[begin:end], case.v[begin:end]
            mask = None if case.key_mask is None else case.key_mask[begin:end]
        else:
            keys = case.key_lengths[begin]
            last_key = first_key + samples * keys
            k = case.k[first_key:last_key].unflatten(0, (samples, keys))
            v = case.v[first_key:last_key].unflatten(0, (samples, keys))
            mask, first_key = None, last_key
        scale = common[begin] if isinstance(common, tuple) else common
        queries = q[first:last].unflatten(0, (samples, tokens))
        parts.append(_dense(attend, queries, k, v, mask, scale).flatten(0, 1))
        first = last
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], case.v.shape[-1])


def _dense(
    attend: _Dense, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    if key_mask is None:
        return attend(q, k, v, None, scale)
    if _can_be_read(key_mask):
        return _by_keys(attend, q, k, v, key_mask, scale)
    return _masked(attend, q, k, v, key_mask, scale)


def _masked(
    attend: _Dense, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float
) -> Tensor:
    alive = key_mask.any(-1, keepdim=True)
    mask = (key_mask | ~alive)[:, None, None]  # softmax over no key at all would be NaN
    return attend(q, k, v, mask, scale).masked_fill(~alive[:, :, None, None], 0.0)


def _can_be_read(mask: Tensor) -> bool:
    """Tell whether looking at a mask costs nothing: eagerly on the CPU."""
    return (
        mask.device.type == "cpu"
        and type(mask) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(mask)
    )


def _by_keys(
    attend: _Dense, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float
) -> Tensor:
    """Attend to the keys that count, sample by sample, without a mask.

    On the CPU a mask makes PyTorch's attention up to twice as slow, and keys that it leaves out
    cost as much as others.
    """
    counts = key_mask.sum(-1).tolist()
    if min(counts) == k.shape[1]:
        return attend(q, k, v, None, scale)
    parts: list[Tensor] = []
    for sample, count in enumerate(counts):
        row, own = slice(sample, sample + 1), key_mask[sample]
        if count == 0:  # zeros, through which gradients still flow to k and v
            parts.append(_masked(attend, q[row], k[row], v[row], key_mask[row], scale))
            continue
        if own[:count].all():
            keys, values = k[row, :count], v[row, :count]
        else:
            places = own.nonzero()[:, 0]
            keys, values = k[row].index_select(1, places), v[row].index_select(1, places)
        parts.append(attend(q[row], keys, values, None, scale))
    return torch.cat(parts)


def attend_with_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend densely, as `attend_in_runs` asks for it, with PyTorch's choice of kernel."""
    # Where PyTorch's fused kernels group heads themselves: on the CPU, where standing the heads in
    # a row as below takes up to 1.3 times as long for short keys; and in flash attention on CUDA,
    # which takes 16 bits and no mask.
    grouping = q.device.type == "cpu" or (
        q.device.type == "cuda" and mask is None and q.dtype in (torch.bfloat16, torch.float16)
    )
    if grouping or q.shape[2] == k.shape[2]:
        return _native(q, k, v, mask, scale)
    # There is no causal order, so the query heads that share a key head can stand one after
    # another along the tokens. K and V are then not repeated by any kernel of PyTorch's.
    tokens, kv_heads = q.shape[1], k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - no symbol when compiled
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


SDPA = Sdpa()
CUDNN = Cudnn()
