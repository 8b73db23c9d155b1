"""Wavelengths: after how many positions a pair has turned once, as numbers and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from rope3d.rope import Rope
from rope3d.timed_rope import TimedRope

__all__ = ["plot_wavelengths", "wavelengths"]


def wavelengths(rope: Rope | TimedRope, t: Tensor | float | None = None) -> Tensor:
    """Compute the wavelength of every pair: 2 pi / frequency.

    Args:
        rope: A layout.
        t: Timestep in [0, 1], 0 = noise, for a `TimedRope`; any shape.

    Returns:
        `[axes, pairs]`, for a `TimedRope` `[*t.shape, axes, pairs]`; float64, in positions;
        infinite where an axis does not turn a pair.

    Raises:
        ValueError: A `TimedRope` was given no timestep.

    >>> import rope3d
    >>> wavelengths(rope3d.axial((4,), base=4.0)) / (2 * math.pi)
    tensor([[1., 2.]], dtype=torch.float64)
    """
    return 2 * math.pi / rope.frequencies_at(t).abs()


def plot_wavelengths(
    ropes: Mapping[str, Rope | TimedRope],
    *,
    axis: int = -1,
    t: Tensor | float | None = None,
    trained: float | None = None,
    target: float | None = None,
    ax: Any = None,
) -> Any:
    """Draw the wavelength of each pair of one axis, one line per layout.

    Needs matplotlib: `pip install "rope3d[plot]"`.

    Args:
        ropes: Layouts by the label of their line.
        axis: The axis of positions to look at.
        t: One timestep in [0, 1], 0 = noise, for those that follow it.
        trained: Trained length in positions; drawn as a horizontal line.
        target: Target length in positions; drawn likewise.
        ax: Matplotlib axes to draw into; None makes a figure.

    Returns:
        The matplotlib axes; `.figure.savefig(path)` saves them.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no layout, or a `TimedRope` was given no timestep.

    Source:
        Lumina-Next, arXiv 2406.18583, figure 5(a).
    """
    if not ropes:
        raise ValueError("no layout to draw; give at least one, such as {'trained': rope}")
    if ax is None:
        try:
            figures = import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError(
                'plot_wavelengths draws with matplotlib; install it: pip install "rope3d[plot]"'
            ) from error
        ax = figures.Figure(figsize=(6.4, 4.4), layout="constrained").add_subplot()
    markers = "osD^vPX*"
    for index, (label, rope) in enumerate(ropes.items()):
        row = wavelengths(rope, t)[axis]
        row = row[row.isfinite()]  # the pairs that this axis turns
        ax.plot(
            range(1, len(row) + 1),
            row.tolist(),
            label=label,
            lw=1.2,
            ms=4,
            mfc="none",
            marker=markers[index % len(markers)],
        )
    for length, name, style in ((trained, "trained length", "--"), (target, "target length", ":")):
        if length is not None:
            ax.axhline(length, color="0.4", lw=1, ls=style, label=f"{name} {length:g}")
    ax.set(xlabel="pair of the axis, fastest first", ylabel="wavelength in positions", yscale="log")
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, fontsize="small")
    return ax
