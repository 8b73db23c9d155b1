"""What a model in bfloat16 costs in accuracy: `python benchmarks/solvers/dtype.py`.

The same solver in float64 is the reference, so that only rounding is measured. Beside it stands
torchdiffeq on a state in the model's dtype, which is how the authors' code samples.
"""

from __future__ import annotations

from collections.abc import Callable

import flows
import torch
from report import table
from torch import Tensor

import flowsolvers as fs

BUDGETS = (10, 30, 100, 300)
SOLVERS = ("auto", "euler", "midpoint", "pec2", "unipc2")
GRIDS = (fs.uniform(), fs.shift(4.0))


def in_bfloat16(flow: flows.Flow) -> Callable[[Tensor, Tensor], Tensor]:
    """Round what goes into the model, its time apart, and what comes out."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        rounded = flow.velocity(t.double(), x.bfloat16().double())
        return rounded.bfloat16()

    return velocity


def ours(flow: flows.Flow, solver: str, grid: fs.Schedule | None, nfe: int) -> str:
    """Error of ours; without a grid on the solver's own."""
    plan = fs.plan(solver, nfe=nfe, schedule=grid)
    exact = fs.solve(flow.velocity, flow.noise, plan=plan).x
    found = fs.solve(in_bfloat16(flow), flow.noise.float(), plan=plan).x
    return _error(found, exact)


def torchdiffeq(flow: flows.Flow, method: str, grid: fs.Schedule, nfe: int) -> str:
    """Error of torchdiffeq on a state in bfloat16."""
    try:
        from torchdiffeq import odeint
    except ImportError:
        return "-"
    steps = nfe // {"euler": 1, "midpoint": 2}[method]
    times = torch.tensor(grid.grid(steps), dtype=torch.float64)
    exact = odeint(flow.velocity, flow.noise, times, method=method)[-1]
    start = flow.noise.bfloat16()
    found = odeint(in_bfloat16(flow), start, times.float(), method=method)[-1]
    return _error(found, exact)


def _error(found: Tensor, exact: Tensor) -> str:
    """RMSE, and the median over samples of their own RMSE, over the standard deviation."""
    squares = (found.double() - exact).square()
    rmse, median = squares.mean().sqrt(), squares.mean(1).sqrt().median()
    return f"{rmse / exact.std():.1e} / {median / exact.std():.1e}"


def report() -> str:
    """Make the table."""
    torch.set_grad_enabled(False)
    flow = next(flow for flow in flows.published() if flow.name == "gmm64")
    rows = [("solver", "grid", *map(str, BUDGETS))]
    default = [ours(flow, "auto", None, nfe) for nfe in BUDGETS]
    rows.append(("flowsolvers auto", "its own", *default))
    for grid in GRIDS:
        for solver in SOLVERS:
            errors = [ours(flow, solver, grid, nfe) for nfe in BUDGETS]
            rows.append((f"flowsolvers {solver}", str(grid), *errors))
        for method in ("euler", "midpoint"):
            cells = [torchdiffeq(flow, method, grid, nfe) for nfe in BUDGETS]
            rows.append((f"torchdiffeq {method}, bfloat16 state", str(grid), *cells))
    return "\n\n".join(
        [
            "## Dtype",
            "A model in bfloat16, against the same solver and grid in float64, at "
            f"{', '.join(map(str, BUDGETS))} evaluations of gmm64: RMSE / median over the samples "
            "of their own RMSE, both over the standard deviation of the data. Where the first is "
            "far above the second, rounding sent a sample or two to another mode.",
            table(rows),
        ]
    )


if __name__ == "__main__":
    print(report())
