"""Attention with flash-attention's kernels: PyTorch's for packed samples, and newer packages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rope3d.attention_case import AttentionCase, boundaries
from rope3d.compile_constant import compile_constant

__all__ = ["FLASH_3", "FLASH_4", "FLASH_VARLEN", "FlashPackage", "FlashVarlen"]


@dataclass(frozen=True)
class FlashVarlen:
    """Call `torch.nn.attention.varlen.varlen_attn`: packed samples of any lengths, one launch."""

    name: str = "flash-varlen"

    def why_not(self, case: AttentionCase) -> str | None:
        """Refuse what flash attention 2 does not take."""
        if not case.packed:
            return "it is for packed samples; others go to sdpa, which has the same kernels"
        return _why_not_flash(case, 256)

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend within each sample."""
        from torch.nn.attention.varlen import varlen_attn

        assert case.lengths is not None
        assert case.key_lengths is not None
        q, scale = case.scaled_queries()
        out = varlen_attn(
            q,
            case.k,
            case.v,
            boundaries(case.lengths, q.device),
            boundaries(case.key_lengths, q.device),
            max(case.lengths),
            max(case.key_lengths),
            scale=scale,
            enable_gqa=q.shape[1] != case.k.shape[1],
        )
        assert isinstance(out, Tensor)
        return out


@dataclass(frozen=True)
class FlashPackage:
    """Call an installed flash-attention of a later generation.

    Args:
        name: Name to choose it by.
        module: The module that has `flash_attn_func` and `flash_attn_varlen_func`.
        generations: Major compute capabilities that it is written for.
        trained: Head dimensions that its backward pass serves on all of them.
    """

    name: str
    module: str
    generations: tuple[int, ...]
    trained: tuple[int, ...]

    def why_not(self, case: AttentionCase) -> str | None:
        """Refuse where it is not installed, and what it does not take."""
        if not _installed(self.module):
            return f"{self.module} is not installed"
        if not case.dense and not case.packed:
            return "it takes queries and keys both dense or both packed"
        reason = _why_not_flash(case, 128)
        if reason is not None:
            return reason
        major = torch.cuda.get_device_properties(case.q.device).major
        if major not in self.generations:
            return f"compute capability {major}.x; it is written for {self.generations}"
        if case.needs_gradient and case.q.shape[-1] not in self.trained:
            return f"its backward pass serves head_dim {self.trained} on all devices"
        return None

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend densely, or within each packed sample."""
        module: Any = import_module(self.module)
        q, scale = case.scaled_queries()
        if case.lengths is None or case.key_lengths is None:
            out = module.flash_attn_func(q, case.k, case.v, softmax_scale=scale)
        else:
            out = module.flash_attn_varlen_func(
                q,
                case.k,
                case.v,
                cu_seqlens_q=boundaries(case.lengths, q.device),
                cu_seqlens_k=boundaries(case.key_lengths, q.device),
                max_seqlen_q=max(case.lengths),
                max_seqlen_k=max(case.key_lengths),
                softmax_scale=scale,
            )
        return out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp


def _why_not_flash(case: AttentionCase, widest: int) -> str | None:
    q, k, v = case.q, case.k, case.v
    if q.device.type != "cuda":
        return f"q is on {q.device.type}; it needs cuda"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; it takes bfloat16 and float16"
    if case.key_mask is not None:
        return "it knows no key mask; leave the keys out and pack"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > widest:
        return (
            f"head_dim is {q.shape[-1]} and value_dim {v.shape[-1]}; it takes equal multiples of 8 "
            f"up to {widest}"
        )
    if case.key_lengths is not None and not all(case.key_lengths):
        return "a sample has no keys"
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to attend to"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the channels of a head must be neighbours in memory"
    return None


@compile_constant
def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


FLASH_VARLEN = FlashVarlen()
# https://github.com/Dao-AILab/flash-attention: `hopper/` is generation 3, `flash_attn/cute` is 4.
# Backward of 4 on Blackwell for other head dimensions: its pull request 2633.
FLASH_3 = FlashPackage("flash-3", "flash_attn_interface", (9,), tuple(range(8, 129, 8)))
FLASH_4 = FlashPackage("flash-4", "flash_attn.cute", (9, 10, 11, 12), (64, 128))
