"""Sampling beyond the size that a model was trained at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rope3d
from nextdit_core.errors import UserError
from nextdit_core.modality import Modality, Size

__all__ = ["Extrapolation"]


@dataclass(frozen=True)
class Extrapolation:
    """Fit rotary positions and attention to more tokens than in training, without training.

    Args:
        method: A method of `rope3d.Rope.extrapolate`: "time-aware", "frequency-aware", "ntk",
            "interpolation", "yarn", "riflex", ...
        trained_size: What the model was trained at; None is the modality's default size.
        proportional: Scale the self attention by the logarithms of the token counts, so that it
            stays as sharp as in training.

    Source: Lumina-Next (arXiv 2406.18583) §2, Time-aware Scaled RoPE; proportional attention is of
        Jin et al. (arXiv 2306.08645).
    """

    method: str = "time-aware"
    trained_size: Size | None = None
    proportional: bool = True

    def options(
        self, modality: Modality, sizes: Sequence[Size], rope: rope3d.Rope
    ) -> dict[str, Any]:
        """Say what `NextDiT.forward` needs besides for samples of some sizes.

        Args:
            modality: Knows the positions of a size.
            sizes: Of the samples of a batch, all as many times longer than in training.
            rope: Of the backbone.

        Returns:
            `rope`, and `scale` with `trained_tokens` where attention is proportional.

        Raises:
            UserError: The method is unknown, or sizes differ in how much longer they are.
        """
        trained = tuple(self.trained_size or modality.default_size)
        positions = modality.positions(trained)
        known = _extents(positions)
        ratios = set()
        for size in set(sizes):
            wanted = _extents(modality.positions(size))
            ratios.add(tuple(max(1.0, a / b) for a, b in zip(wanted, known, strict=True)))
        if len(ratios) > 1:
            raise UserError(
                f"sizes {sorted(set(sizes))} are not equally many times longer than {trained}; "
                f"sample those with extrapolation one size at a time"
            )
        (ratio,) = ratios
        try:
            found = rope.extrapolate(self.method, scale=ratio, trained=known)
        except ValueError as error:
            raise UserError(f"extrapolation: {error}") from error
        options: dict[str, Any] = {"rope": found}
        if self.proportional and math.prod(ratio) > 1.0:
            options |= {"scale": "proportional", "trained_tokens": len(positions)}
        return options


def _extents(positions: Any) -> tuple[float, ...]:
    """Positions from the first to the last, both counted, along each axis."""
    return tuple((positions.max(0).values - positions.min(0).values + 1.0).tolist())
