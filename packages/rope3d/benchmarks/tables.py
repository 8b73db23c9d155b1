"""Print how far rope3d is from other projects, and from exact angles, as Markdown.

    python benchmarks/tables.py

The first table runs the tests that compare with a project and prints what they record; those whose
project is not installed are left out. The second measures cosines and sines against float64.
"""

from __future__ import annotations

import contextlib
import io
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import rope3d
from rope3d import angles

TESTS = Path(__file__).parents[1] / "tests"
TOPS = (0, 100, 1000, 10_000, 100_000, 1_000_000)
ROPES = (rope3d.lumina(72), rope3d.axial((64, 64)), rope3d.mrope((32, 32)))


class Recorder:
    """A plug-in of pytest that keeps the largest difference for each layout and source."""

    def __init__(self) -> None:
        self.apart: dict[tuple[str, str], float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Read what the fixture `apart` recorded."""
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "apart":
                *key, difference = value
                layout, source = map(str, key)
                self.apart[layout, source] = max(difference, self.apart.get((layout, source), 0.0))


def parity() -> dict[tuple[str, str], float]:
    """Run the tests that name another project and collect the differences."""
    recorder, output = Recorder(), io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["-q", str(TESTS), "-k", "equals or _does"], plugins=[recorder])
    if code != pytest.ExitCode.OK:
        raise SystemExit(output.getvalue())
    return recorder.apart


def errors(top: int) -> dict[str, float]:
    """Measure the largest error of a cosine or sine at positions up to 100 below `top`.

    Positions are float32 numbers, half of them whole; the exact angle is the one of these numbers.
    """
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for rope in ROPES:
        positions = torch.rand(2000, rope.axes, generator=generator) * -min(top, 100) + top
        positions[::2] = positions[::2].round()
        t = torch.rand(2000, generator=generator)
        timed = rope.extrapolate("time-aware", scale=2.0)
        learned = rope3d.LearnedRope(rope)
        trained = rope.frequencies_at()
        for name, layout, exact, float64 in (
            ("`Rope`, float64", rope, trained, True),
            ("`Rope`, turns", rope, trained, False),
            ("`TimedRope`, float64", timed, timed.frequencies_at(t), True),
            ("`TimedRope`, double-float and turns", timed, timed.frequencies_at(t), False),
            ("`LearnedRope`, float64", learned, learned.frequencies.detach().double(), True),
            ("`LearnedRope`, turns", learned, learned.frequencies.detach().double(), False),
        ):
            with mock.patch.object(angles, "has_float64", lambda device, has=float64: has):
                rotation = layout.rotation(positions, t)
            error = difference(rotation.cos, rotation.sin, positions, exact)
            worst[name] = max(error, worst.get(name, 0.0))
        plain = (positions.unsqueeze(-1) * trained.float()).sum(-2)
        error = difference(plain.cos(), plain.sin(), positions, trained)
        worst["plain float32, for contrast"] = max(
            error, worst.get("plain float32, for contrast", 0.0)
        )
    return worst


def difference(cos: Tensor, sin: Tensor, positions: Tensor, frequencies: Tensor) -> float:
    """Compare with the float64 angle of `[tokens, axes]` and `[(tokens,) axes, pairs]`."""
    angle = (positions.double().unsqueeze(-1) * frequencies).sum(-2)
    both = (cos.double() - angle.cos()).abs().max(), (sin.double() - angle.sin()).abs().max()
    return torch.stack(both).max().item()


def installed(name: str) -> str:
    """Name a distribution and its version."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def main() -> None:
    """Print both tables."""
    projects = ", ".join(map(installed, ("torch", "diffusers", "transformers", "timm")))
    print(f"Largest difference of a cosine or sine, CPU; {projects}.\n")
    print("| layout | project | max abs difference |\n|---|---|---|")
    for (layout, source), value in sorted(parity().items(), key=lambda item: item[0][::-1]):
        print(f"| `{layout}` | {source} | {value:.1e} |")
    print("\nLargest error of a cosine or sine against float64, at positions up to\n")
    print("| angles | " + " | ".join(f"{top:,}" for top in TOPS) + " |")
    print("|---" * (1 + len(TOPS)) + "|")
    columns = [errors(top) for top in TOPS]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.1e}" for column in columns) + " |")


if __name__ == "__main__":
    main()
