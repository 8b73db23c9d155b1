"""Error of solvers at a budget of evaluations: `python benchmarks/solvers/accuracy.py`.

On flows with a closed form, against a solution of 2400 evaluations. Beside ours stand the
schedulers of diffusers and the methods of torchdiffeq, where they are installed, on the same grids.
Without `--all` only the four published flows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import flows
import torch
from report import table
from torch import Tensor

import flowsolvers as fs

BUDGETS = (4, 6, 8, 10, 16, 20, 30, 40)
OURS = ("auto", "euler", "midpoint", "rk4", "ab2", "ab3", "pec1", "pec2", "pec3", "res2", "unipc2")
GRIDS = {
    "uniform": fs.uniform(),
    "shift:2": fs.shift(2.0),
    "shift:4": fs.shift(4.0),
    "logistic:3": fs.logistic(3.0),
    "logistic:4": fs.logistic(4.0),
    "cosine": fs.cosine(),
}
SCHEDULERS = {
    "diffusers FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "diffusers FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
    "diffusers UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "diffusers UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "diffusers DPM++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "diffusers DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
}
#: The default, and what it is to reach: its error over the best of others', by budget.
AUTO = ("flowsolvers auto", "its own")
GOALS = (0.97, 0.88, 0.80, 0.50, 0.65, 0.65, 0.45, 0.40)

METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}

#: Name of the solver and of the grid, and what runs it for a budget, or None if it cannot.
Entry = tuple[str, str, Callable[[flows.Flow, int], Tensor | None]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Error of solvers at a budget of evaluations.")
    parser.add_argument("--all", action="store_true", help="the nine other flows besides")
    options = parser.parse_args()
    print(report(measured(published_only=not options.all)))
    return 0


@dataclass(frozen=True)
class Measured:
    """The error of every entry on every flow at every budget, NaN where there is none.

    Args:
        flows: Names.
        errors: (solver, grid) to `[budgets][flows]`.
    """

    flows: list[str]
    errors: dict[tuple[str, str], list[list[float]]]

    def means(self, key: tuple[str, str]) -> list[float]:
        """Geometric means over the flows, one for each budget."""
        return [
            math.exp(sum(map(math.log, row)) / len(row)) if all(e == e for e in row) else math.nan
            for row in self.errors[key]
        ]

    def best(self, peers: bool) -> list[tuple[float, str]]:
        """The least mean of others', or of ours but auto, at each budget, and whose it is."""
        found = [(math.inf, "")] * len(BUDGETS)
        for key in self.errors:
            if key == AUTO or key[0].startswith("flowsolvers") == peers:
                continue
            for i, mean in enumerate(self.means(key)):
                if mean < found[i][0]:
                    found[i] = mean, " on ".join(key)
        return found


def measured(*, published_only: bool) -> Measured:
    """Run everything."""
    torch.set_grad_enabled(False)
    problems = flows.published() + ([] if published_only else flows.held_out())
    exact = {}
    for flow in problems:
        print(f"  reference of {flow.name}", file=sys.stderr, flush=True)
        plan = fs.plan("rk4", nfe=2400, schedule=fs.logistic(4.0))
        exact[flow.name] = fs.solve(flow.velocity, flow.noise, plan=plan).x
    errors = {}
    for solver, grid, run in entries():
        print(f"  {solver} on {grid}", file=sys.stderr, flush=True)
        errors[solver, grid] = [
            [error(flow, exact[flow.name], run(flow, nfe)) for flow in problems] for nfe in BUDGETS
        ]
    return Measured([flow.name for flow in problems], errors)


def error(flow: flows.Flow, answer: Tensor, found: Tensor | None) -> float:
    """Root mean square error over the standard deviation."""
    del flow
    if found is None:
        return math.nan
    return ((found.double() - answer).square().mean().sqrt() / answer.std()).item()


def report(found: Measured) -> str:
    """Write the tables."""
    rows = [("solver", "grid", *(str(n) for n in BUDGETS))]
    rows += [
        (*key, *("-" if m != m else f"{m:.4f}" for m in found.means(key))) for key in found.errors
    ]
    auto, peers = found.means(AUTO), found.best(peers=True)
    summary = [("evaluations", "auto", "best of others", "whose", "ratio", "goal")]
    for n, ours, (theirs, who), goal in zip(BUDGETS, auto, peers, GOALS, strict=True):
        ratio = f"{ours / theirs:.2f}" if theirs < math.inf else "-"
        summary.append((str(n), f"{ours:.4f}", f"{theirs:.4f}", who, ratio, f"{goal:.2f}"))
    euler = found.errors["flowsolvers euler", "uniform"]
    worst = [("flow", *(str(n) for n in BUDGETS))]
    for i, name in enumerate(found.flows):
        ratios = (a[i] / b[i] for a, b in zip(found.errors[AUTO], euler, strict=True))
        worst.append((name, *(f"{ratio:.2f}" for ratio in ratios)))
    return "\n\n".join(
        [
            "## Accuracy",
            "Geometric mean over the flows of the root mean square error over the standard "
            "deviation of the data; float64, diffusers in its own precision. A dash: the method "
            f"does not take that many evaluations, or is not installed. Flows: "
            f"{', '.join(found.flows)}.",
            "The default against the best of torchdiffeq and diffusers on any of the grids:",
            table(summary),
            "The default's error over that of Euler's method on even steps, flow by flow:",
            table(worst),
            "All of them:",
            table(rows),
        ]
    )


def entries() -> Iterator[Entry]:
    yield (*AUTO, ours("auto", None))
    for name, grid in GRIDS.items():
        for solver in OURS:
            yield f"flowsolvers {solver}", name, ours(solver, grid)
        for label, (kind, settings) in SCHEDULERS.items():
            yield label, name, scheduler(kind, settings, grid)
        for method, stages in METHODS.items():
            yield f"torchdiffeq {method}", name, torchdiffeq(method, stages, grid)


def ours(solver: str, grid: fs.Schedule | None) -> Callable[[flows.Flow, int], Tensor]:
    def run(flow: flows.Flow, nfe: int) -> Tensor:
        return fs.solve(flow.velocity, flow.noise, nfe=nfe, solver=solver, schedule=grid).x

    return run


def scheduler(
    kind: str, settings: dict[str, int], grid: fs.Schedule
) -> Callable[[flows.Flow, int], Tensor | None]:
    """Drive a scheduler of diffusers on our sigmas, as a pipeline does."""

    def run(flow: flows.Flow, nfe: int) -> Tensor | None:
        try:
            import diffusers
        except ImportError:
            return None
        steps = (nfe + 1) // 2 if kind == "FlowMatchHeunDiscreteScheduler" else nfe
        sigmas = [1.0 - t for t in grid.grid(steps)]
        if kind == "FlowMatchEulerDiscreteScheduler":
            one = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
            one.set_timesteps(sigmas=sigmas[:-1])
        elif kind == "FlowMatchHeunDiscreteScheduler":
            # Two evaluations a step, one in the last: 2 * steps - 1 of the budget. It takes no
            # sigmas, so they are put where its own would be.
            one = diffusers.FlowMatchHeunDiscreteScheduler(shift=1.0)
            one.set_timesteps(steps)
            inner = [s for s in sigmas[1:-1] for _ in range(2)]
            one.sigmas = torch.tensor([sigmas[0], *inner, sigmas[-1]], dtype=torch.float64)
            one.timesteps = one.sigmas[:-1] * 1000
        else:
            one = getattr(diffusers, kind)(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **settings
            )
            one.set_timesteps(nfe)
            # log-SNR is infinite at noise, where diffusers starts a little later.
            one.sigmas = torch.tensor([min(s, 0.999) for s in sigmas], dtype=torch.float64)
            one.timesteps = one.sigmas[:-1] * 1000
        one.set_begin_index(0)
        x = flow.noise
        for sigma, timestep in zip(one.sigmas.tolist(), one.timesteps, strict=False):
            v = flow.velocity(torch.tensor(1.0 - sigma, dtype=torch.float64), x)
            x = one.step(-v, timestep, x, return_dict=False)[0].double()
        return x

    return run


def torchdiffeq(
    method: str, stages: int, grid: fs.Schedule
) -> Callable[[flows.Flow, int], Tensor | None]:
    def run(flow: flows.Flow, nfe: int) -> Tensor | None:
        try:
            from torchdiffeq import odeint
        except ImportError:
            return None
        if nfe % stages:
            return None
        times = torch.tensor(grid.grid(nfe // stages), dtype=torch.float64)
        return odeint(flow.velocity, flow.noise, times, method=method)[-1]

    return run


if __name__ == "__main__":
    sys.exit(main())
