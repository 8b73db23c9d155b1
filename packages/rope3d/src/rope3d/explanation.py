"""Explanation: which backend would run here, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rope3d import attention_backends
from rope3d.backends import explain_rotation
from rope3d.gated_text import GatedText
from rope3d.learned_rope import LearnedRope
from rope3d.rope import Rope
from rope3d.softmax_attention import case_of, text_case_of
from rope3d.timed_rope import TimedRope

__all__ = ["explain"]


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    rope: Rope | TimedRope | LearnedRope | None = None,
    *,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    key_mask: Tensor | None = None,
    text: GatedText | None = None,
    rounded_scores: bool = False,
    backend: str | None = None,
    rotation_backend: str | None = None,
) -> str:
    """Tell which backends would rotate and attend here, and why the others would not.

    Args:
        q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
        k: As `q`, with its own number of heads.
        v: Values of an attention; without them only the rotation is explained.
        rope: The layout; without it, and with `v`, only the attention is explained.
        lengths: As in `attention`.
        key_lengths: As in `attention`.
        key_mask: As in `attention`.
        text: As in `attention`.
        rounded_scores: As in `attention`.
        backend: As in `attention`; without `v`, as in `rotate`.
        rotation_backend: As in `attention`.

    Returns:
        A table for the rotation, the attention and the attention to text, each with one line per
        backend: name, distribution, whether it runs, why.

    Raises:
        ValueError: A name is not installed, or the arguments do not fit one another.
        RuntimeError: Two distributions claim one name.

    >>> import torch
    >>> q = torch.zeros(1, 4, 2, 8)
    >>> print(explain(q, q, backend="reference").splitlines()[0].split())
    ['backend', 'from', 'runs', 'why']
    """
    if v is None:
        return explain_rotation(q, k, backend=backend)
    case = case_of(q, k, v, lengths, key_lengths, key_mask, rounded_scores=rounded_scores)
    parts = [f"attention\n{attention_backends.explain(case, backend)}"]
    if rope is not None:
        if rope.head_dim != q.shape[-1]:
            raise ValueError(
                f"rope is for head_dim {rope.head_dim} and q has shape {tuple(q.shape)}; build "
                f"the layout with head_dim={q.shape[-1]}"
            )
        parts.insert(0, f"rotation\n{explain_rotation(q, k, backend=rotation_backend)}")
    if text is not None:
        table = attention_backends.explain(text_case_of(case, text), backend, gated=True)
        parts.append(f"gated attention to text\n{table}")
    return "\n\n".join(parts)
