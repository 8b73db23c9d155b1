"""What nextdit-core finds through the entry-point group `nextdit.kernels`: a block's operations.

For each operation a method of its name, and one that says why it cannot serve some tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nextdit_kernels import glu, qk_norm, sandwich

__all__ = ["BLOCK", "TritonBlock"]


class _Rotation(Protocol):
    """What is read of a `rope3d.Rotation`; rope3d itself is not imported."""

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...
    @property
    def pairing(self) -> str: ...
    @property
    def untouched(self) -> int: ...
    @property
    def per_head(self) -> bool: ...


@dataclass(frozen=True)
class TritonBlock:
    """One Triton launch per operation; satisfies `nextdit_core.BlockKernels` without importing it.

    The arguments are those of the functions of the same names in `nextdit_kernels`.
    """

    name: str = "triton"

    def why_not_swiglu(self, gate: Tensor, up: Tensor) -> str | None:
        """Say why `swiglu` cannot serve these tensors, or None if it can."""
        return glu.why_not(gate, up)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply `up` by silu of `gate`."""
        return glu.swiglu(gate, up)

    def why_not_norm_modulate(self, x: Tensor, weight: Tensor | None, scale: Tensor) -> str | None:
        """Say why `norm_modulate` cannot serve these tensors, or None if it can."""
        return sandwich.why_not_norm_modulate(x, weight, scale)

    def norm_modulate(
        self, x: Tensor, weight: Tensor | None, scale: Tensor, *, eps: float, centred: bool
    ) -> Tensor:
        """Normalise rows and scale them by the modulation."""
        return sandwich.norm_modulate(x, weight, scale, eps=eps, centred=centred)

    def why_not_gate_residual(
        self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor
    ) -> str | None:
        """Say why `gate_residual` cannot serve these tensors, or None if it can."""
        return sandwich.why_not_gate_residual(x, y, weight, gate)

    def gate_residual(
        self, x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, *, eps: float
    ) -> Tensor:
        """Normalise rows of y, gate them and add them to x."""
        return sandwich.gate_residual(x, y, weight, gate, eps=eps)

    def why_not_norm_rotate(self, q: Tensor, k: Tensor, rotation: _Rotation) -> str | None:
        """Say why `norm_rotate` cannot serve these tensors, or None if it can."""
        if rotation.pairing != "interleaved" or rotation.untouched or rotation.per_head:
            return "the kernel turns all adjacent pairs of a head, by the angles of all heads"
        if rotation.cos.requires_grad or rotation.sin.requires_grad:
            return "cos or sin requires a gradient, which the kernel does not compute"
        return qk_norm.why_not(q, k)

    def norm_rotate(
        self, q: Tensor, k: Tensor, rotation: _Rotation, *norms: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys over all channels of a token, and rotate them."""
        q_weight, q_bias, k_weight, k_bias = norms
        return qk_norm.norm_rotate(
            q,
            k,
            rotation.cos,
            rotation.sin,
            q_weight=q_weight,
            q_bias=q_bias,
            k_weight=k_weight,
            k_bias=k_bias,
            eps=eps,
        )


BLOCK = TritonBlock()
