"""Attention as two bfloat16 matrix products, for CPUs that are quicker at those than at SDPA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rope3d.attend_sdpa import attend_in_runs, attend_with_sdpa
from rope3d.attention_case import AttentionCase

__all__ = ["PRODUCTS", "Products", "pays_here"]

# Scores that are held at once: 2 MiB, about a second-level cache.
_BLOCK = 2**20

# Scores of one key head below which a call of PyTorch's own attention is quicker.
_FEW = 2**16


@dataclass(frozen=True)
class Products:
    """Compute softmax(scale * q k^T) v by a matrix product, a softmax and a matrix product.

    PyTorch's fused kernel for the CPU converts bfloat16 to float32 where the processor lacks tile
    instructions (AMX); with AVX512-BF16 matrix products in bfloat16 are twice as fast as in
    float32, and so this took 0.6 of its time (a Zen 4 core, 1024 tokens, head_dim 64). Scores are
    rounded to bfloat16; sums and the softmax are float32 as there. Counted from q, k and v before
    they were rounded to bfloat16, the error was 0.5 instead of 0.4 % at scores of standard
    deviation 1, 1.1 instead of 0.5 % at 2 and 1.6 instead of 0.8 % at 8.
    """

    name: str = "products"

    def why_not(self, case: AttentionCase) -> str | None:
        """Serve eager bfloat16 on the CPU, where no gradient is recorded."""
        if case.q.device.type != "cpu" or case.q.dtype != torch.bfloat16:
            return f"q is {case.q.dtype} on {case.q.device.type}; it takes bfloat16 on the cpu"
        if torch.compiler.is_compiling() or type(case.q) is not Tensor:
            return "it is for eager tensors; the compiler has its own order of operations"
        if case.needs_gradient:
            return "gradients are recorded, and sdpa keeps less for them"
        if any(
            torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (case.q, case.k, case.v)
        ):
            return "torch.func transforms the tensors, and it writes into its result"
        return None

    def attend(self, case: AttentionCase) -> Tensor:
        """Attend densely, or run by run."""
        return attend_in_runs(case, _attend)


@cache
def pays_here() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices faster than SDPA attends.

    >>> pays_here() in (True, False)
    True
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    fast = known.get("avx512_bf16", False) and not known.get("amx_bf16", False)
    return bool(fast) and torch.backends.mkldnn.is_available()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    samples, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    if mask is not None or group * tokens * keys < _FEW:
        return attend_with_sdpa(q, k, v, mask, scale)
    out = q.new_empty(samples, tokens, heads, v.shape[-1])
    rows = max(1, min(tokens, _BLOCK // (group * keys)))
    start = q.new_zeros(())  # multiplied by 0: the product alone takes no factor
    for sample in range(samples):
        for head in range(kv_heads):
            # Query heads that share a key head stand one after another.
            own = slice(head * group, (head + 1) * group)
            turned, values = k[sample, :, head].T, v[sample, :, head]
            for part, result in zip(q[sample].split(rows), out[sample].split(rows), strict=True):
                queries = part[:, own].reshape(-1, head_dim)
                scores = torch.addmm(start, queries, turned, beta=0, alpha=scale)
                result[:, own] = (scores.softmax(-1) @ values).unflatten(0, (-1, group))
    return out


PRODUCTS = Products()
