"""The backend that rope3d finds through the entry-point group `rope3d.backends`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nextdit_kernels import rotary

__all__ = ["TRITON", "TritonBackend"]


@dataclass(frozen=True)
class TritonBackend:
    """Rotate with one Triton launch; satisfies `rope3d.Backend` without importing rope3d."""

    name: str = "triton"

    def why_not(self, q: Tensor, k: Tensor) -> str | None:
        """Say why the kernel cannot serve these tensors, or None if it can.

        Args:
            q: `[batch, tokens, heads, head_dim]` or `[tokens, heads, head_dim]`.
            k: As `q`, with its own number of heads.

        Returns:
            A reason that names what is served, or None.
        """
        return rotary.why_not(q, k)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate as `nextdit_kernels.rotate` documents."""
        return rotary.rotate(q, k, cos, sin)

    def rotate_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate in place, as `nextdit_kernels.rotate_` documents."""
        rotary.rotate_(q, k, cos, sin)


TRITON = TritonBackend()
