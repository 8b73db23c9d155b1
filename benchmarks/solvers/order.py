"""Measured order of every solver: `python benchmarks/solvers/order.py`.

The slope of log error over log step on a mixture of Gaussians, on an even grid and two warped
ones, against SciPy's DOP853. A single Gaussian would flatter the midpoint rule, of order 3 there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flows
import torch
from report import table
from scipy.integrate import solve_ivp

import flowsolvers as fs

GRIDS = (fs.uniform(), fs.shift(4.0), fs.sigmoid())

#: Exponential methods work in log-SNR, which is infinite at both ends; from 0 to 1 their error is
#: of order h² log h at best, whatever their nominal order.
EXPONENTIAL = ("dpm2m", "dpm3m", "res2", "res3", "unipc2", "unipc3")
INNER = (0.05, 0.95)

#: Steps on which the slope is fitted, by nominal order: fine enough for the leading term, coarse
#: enough to stay above rounding.
STEPS = {
    1: (128, 192, 256, 384),
    2: (256, 384, 512, 768),
    3: (192, 256, 384, 512),
    4: (384, 512, 768, 1024),
}


@dataclass(frozen=True)
class Problem:
    """A flow from a state at one time to the answer at another."""

    mixture: flows.Mixture
    x0: torch.Tensor
    answer: torch.Tensor
    start: float
    end: float


def smooth(start: float, end: float) -> Problem:
    """Three broad modes in the plane, 48 noises, and where they end."""
    means = torch.tensor([[-1.2, 0.5], [0.9, -0.7], [0.4, 1.1]])
    deviations = torch.tensor([[0.5], [0.6], [0.4]]).expand(3, 2)
    mixture = flows.Mixture(means, deviations, torch.tensor([0.4, 0.35, 0.25]))
    noise = torch.randn(48, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def field(t: float, y: object) -> object:
        x = torch.as_tensor(y).view(noise.shape)
        return mixture.velocity(torch.tensor(t, dtype=torch.float64), x).flatten().numpy()

    answer = solve_ivp(
        field, (start, end), noise.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-13
    )
    found = torch.from_numpy(answer.y[:, -1]).view(noise.shape)
    return Problem(mixture, noise, found, start, end)


def slope(solver: str, grid: fs.Schedule, problem: Problem) -> float:
    """Fit the order of a solver on a grid."""
    method = fs.method(solver)
    stages = getattr(method, "stages", 1)
    logs = []
    for steps in STEPS[min(method.order, 4)]:
        x = fs.solve(
            problem.mixture.velocity,
            problem.x0,
            nfe=steps * stages,
            solver=solver,
            schedule=grid,
            start=problem.start,
            end=problem.end,
        ).x
        error = (x - problem.answer).square().mean().sqrt().item()
        logs.append((math.log(steps), math.log(error)))
    mean_n, mean_e = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    top = sum((n - mean_n) * (e - mean_e) for n, e in logs)
    return -top / sum((n - mean_n) ** 2 for n, _ in logs)


def report() -> str:
    """Make the table."""
    torch.set_grad_enabled(False)
    whole, inner = smooth(0.0, 1.0), smooth(*INNER)
    rows = [("solver", "from", "to", "nominal", *map(str, GRIDS), "largest difference")]
    for solver in fs.solvers():
        for problem in (inner, whole) if solver in EXPONENTIAL else (whole,):
            order = fs.method(solver).order
            slopes = [slope(solver, grid, problem) for grid in GRIDS]
            worst = max((s - order for s in slopes), key=abs)
            ends = f"{problem.start:g}", f"{problem.end:g}"
            rows.append((solver, *ends, str(order), *(f"{s:.2f}" for s in slopes), f"{worst:+.2f}"))
    return "\n\n".join(
        [
            "## Order",
            "Slope of log RMSE over log steps on a mixture of three Gaussians in the plane, "
            "float64, against DOP853 at 1e-13. Exponential methods are also shown between "
            f"{INNER[0]} and {INNER[1]}: at 0 and 1 the log-SNR that they work in is infinite, and "
            "there they fall to order h² log h.",
            table(rows),
        ]
    )


if __name__ == "__main__":
    print(report())
