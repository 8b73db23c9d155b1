"""Sampling beyond the size that a model was trained at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rope3d
from nextdit_core.errors import UserError
from nextdit_core.modality import Modality, Size

__all__ = ["Extrapolation"]

#: Columns of positions (time or view, row, column) that a number of axes uses.
USED = {1: (0,), 2: (1, 2), 3: (0, 1, 2)}


@dataclass(frozen=True)
class Extrapolation:
    """Fit rotary positions and attention to more tokens than in training, without training.

    Args:
        method: A method of `rope3d.Rope.extrapolate`: "time-aware", "frequency-aware", "ntk",
            "interpolation", "yarn", "riflex", ...
        trained_size: What the model was trained at; None is the modality's default size.
        proportional: Scale the self attention by the logarithms of the token counts, so that it
            stays as sharp as in training. With the method "extrapolation", which leaves positions
            as they are, this is all that is done.
        by: How much longer: "axis", each axis by its own ratio to the trained size; or "area", all
            axes alike by the token counts' ratio (its square root where there are two axes), as
            the authors' code and diffusers do.
        watershed: Time in [0, 1] at which the method "time-aware-watershed" turns from
            interpolation to NTK; the authors' is 0.3, and diffusers' default of 1 interpolates
            throughout.

    Raises:
        UserError: `by` is another word, or the watershed is outside [0, 1].

    Source: Lumina-Next (arXiv 2406.18583) §2, Time-aware Scaled RoPE; proportional attention is of
        Jin et al. (arXiv 2306.08645).
    """

    method: str = "time-aware"
    trained_size: Size | None = None
    proportional: bool = True
    by: Literal["axis", "area"] = "axis"
    watershed: float = 0.3

    def __post_init__(self) -> None:
        """Check the settings that no method checks."""
        if self.by not in ("axis", "area"):
            raise UserError(f"extrapolation by {self.by!r}; accepted: axis, area")
        if not 0.0 <= self.watershed <= 1.0:
            raise UserError(f"extrapolation watershed is {self.watershed}; expected 0 to 1")

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
            longer = [a / b for a, b in zip(wanted, known, strict=True)]
            if self.by == "area":
                used = USED[modality.axes]
                mean = math.prod(longer) ** (1.0 / len(used))
                longer = [mean if axis in used else 1.0 for axis in range(3)]
            ratios.add(tuple(max(1.0, ratio) for ratio in longer))
        if len(ratios) > 1:
            raise UserError(
                f"sizes {sorted(set(sizes))} are not equally many times longer than {trained}; "
                f"sample those with extrapolation one size at a time"
            )
        (ratio,) = ratios
        try:
            found = rope.extrapolate(
                self.method, scale=ratio, trained=known, watershed=self.watershed
            )
        except ValueError as error:
            raise UserError(f"extrapolation: {error}") from error
        options: dict[str, Any] = {"rope": found}
        if self.proportional and math.prod(ratio) > 1.0:
            options |= {"scale": "proportional", "trained_tokens": len(positions)}
        return options


def _extents(positions: Any) -> tuple[float, ...]:
    """Positions from the first to the last, both counted, along each axis."""
    return tuple((positions.max(0).values - positions.min(0).values + 1.0).tolist())
