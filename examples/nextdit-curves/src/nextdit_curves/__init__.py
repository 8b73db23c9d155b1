"""Curves in the plane as a modality of Next-DiT: everything that a plug-in has to bring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextdit_core import Example, Modality, Size, UserError

__all__ = ["Curves", "Shapes"]


class Curves(Modality):
    """Curves as points in order; a token is a run of points.

    The medium is its own latent, a float tensor `[points, 2]` of roughly unit scale.

    Args:
        points: Points of a curve where no size is asked for.
        run: Points in one token.
    """

    axes = 1
    suffix = ".svg"

    def __init__(self, points: int = 32, run: int = 4) -> None:
        self.run = run
        self.token_dim = 2 * run
        self.default_size = (points,)
        self.options = {"points": points, "run": run}
        self.positions(self.default_size)

    def size(self, latent: Tensor) -> Size:
        """Read the number of points."""
        return (latent.shape[0],)

    def positions(self, size: Size) -> Tensor:
        """Give `[tokens, 3]` positions: a token's number in the first column."""
        if len(size) != 1 or size[0] < 1 or size[0] % self.run:
            raise UserError(
                f"curve size {'x'.join(map(str, size))} does not work; expected a number of "
                f"points that is a multiple of {self.run}"
            )
        positions = torch.zeros(size[0] // self.run, 3)
        positions[:, 0] = torch.arange(len(positions))
        return positions

    def tokenize(self, latent: Tensor) -> Tensor:
        """Cut `[points, 2]` into `[tokens, token_dim]`."""
        return latent.reshape(-1, self.token_dim)

    def detokenize(self, values: Tensor, size: Size) -> Tensor:
        """Put `[tokens, token_dim]` together to `[points, 2]`."""
        return values.reshape(*size, 2)

    def write(self, media: Sequence[Any], path: Path, captions: Sequence[str]) -> None:
        """Draw the curves side by side, with their captions, as SVG."""
        parts = [
            f'<g transform="translate({120 * i + 60} 60)"><polyline fill="none" '
            f'stroke="black" points="{_path(curve)}"/><text y="58" text-anchor="middle" '
            f'font-size="9">{_escape(caption)}</text></g>'
            for i, (curve, caption) in enumerate(zip(media, captions, strict=True))
        ]
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{120 * len(media)}" height="130">\n'
            + "\n".join(parts)
            + "\n</svg>\n",
            encoding="utf-8",
        )


class Shapes:
    """Circles, spirals and waves of random size and phase.

    Args:
        count: How many.
        points: Points of each.
        seed: Seed of the random numbers.
    """

    def __init__(self, count: int = 300, points: int = 32, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.numbers = torch.rand(count, 2, generator=random).tolist()
        self.points = points

    def __len__(self) -> int:
        """Count the curves."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        """Draw one curve."""
        name = ("circle", "spiral", "wave")[index % 3]
        scale, phase = 0.8 + 0.4 * self.numbers[index][0], 0.1 * self.numbers[index][1]
        s = torch.linspace(0, 1, self.points)
        angle = 2 * math.pi * (s + phase)
        x, y = {
            "circle": (angle.cos(), angle.sin()),
            "spiral": (s * (2 * angle).cos(), s * (2 * angle).sin()),
            "wave": (2 * s - 1, 0.5 * (2 * angle).sin()),
        }[name]
        return Example(scale * torch.stack([x, y], dim=-1), f"a {name}")


def _path(curve: Tensor) -> str:
    return " ".join(f"{40 * x:.1f},{-40 * y:.1f}" for x, y in curve.tolist())


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
