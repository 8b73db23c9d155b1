"""What nextdit-core finds through the entry-point group `nextdit.kernels`: a block's operations.

For each operation a method of its name, and one that says why it cannot serve some tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nextdit_kernels import glu, sandwich

__all__ = ["BLOCK", "TritonBlock"]


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


BLOCK = TritonBlock()
