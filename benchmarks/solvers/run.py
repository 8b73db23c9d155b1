"""All tables of the solvers by one command: `python benchmarks/solvers/run.py --write`.

Accuracy, order, overhead, dtype and parity, and a plot of error against evaluations; minutes on a
CPU. `--write` saves them to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import accuracy
import dtype
import order
import overhead
import parity
from report import versions

RESULTS = Path(__file__).resolve().parents[1] / "results"

#: What the plot shows, and how it is called there.
CURVES = {
    accuracy.AUTO: "flowsolvers auto",
    ("torchdiffeq euler", "uniform"): "Euler, even steps",
    ("torchdiffeq midpoint", "uniform"): "torchdiffeq midpoint, even steps",
    ("torchdiffeq midpoint", "shift:4"): "torchdiffeq midpoint, shift 4",
    ("diffusers DPM++ 2M", "uniform"): "diffusers DPM++ 2M, even steps",
    ("diffusers UniPC 2", "uniform"): "diffusers UniPC-2, even steps",
    ("diffusers UniPC 2", "logistic:4"): "diffusers UniPC-2, logistic 4",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="All tables of the solvers.")
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    options = parser.parse_args()
    found = accuracy.measured(published_only=False)
    head = "\n".join(
        [
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            f"- machine: {platform.processor() or platform.machine()}, one thread",
            f"- versions: {versions('torch', 'flowsolvers', 'diffusers', 'torchdiffeq', 'scipy')}",
        ]
    )
    parts = ["# Solvers", head, accuracy.report(found)]
    for module in (order, overhead, dtype, parity):
        print(f"  {module.__name__}", file=sys.stderr, flush=True)
        parts.append(module.report())
    text = "\n\n".join(parts)
    print(text)
    if options.write:
        name = f"solvers--{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        plot(found, RESULTS / f"{name}.png")
        print(f"written to {RESULTS / name}.md and .png")
    return 0


def plot(found: accuracy.Measured, file: Path) -> None:
    """Draw error against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for key, label in CURVES.items():
        if key not in found.errors:
            continue
        points = [(n, e) for n, e in zip(accuracy.BUDGETS, found.means(key), strict=True) if e == e]
        style = {"linewidth": 3, "color": "black"} if key == accuracy.AUTO else {"linewidth": 1.4}
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
    axes.set_xticks(accuracy.BUDGETS, map(str, accuracy.BUDGETS))
    axes.minorticks_off()
    axes.set_xlabel("velocity evaluations")
    axes.set_ylabel("RMSE / standard deviation, geometric mean")
    axes.set_title(f"Error on {len(found.flows)} flows with a closed form")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
