"""Error of solvers at a budget of evaluations: `python benchmarks/solvers/accuracy.py`.

On flows with a closed form, against a solution of 2400 evaluations. Beside ours stand the
schedulers of diffusers and the methods of torchdiffeq, where they are installed, on the same grids.
`--write` saves the table to benchmarks/results/; without `--all` only the four published flows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import flows
import torch
from torch import Tensor

import flowsolvers as fs

BUDGETS = (4, 6, 8, 10, 16, 20, 30, 40)
OURS = ("euler", "midpoint", "rk4", "ab2", "ab3", "pec1", "pec2", "pec3", "res2", "unipc2")
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
METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}

#: Name of the solver and of the grid, and what runs it for a budget, or None if it cannot.
Entry = tuple[str, str, Callable[[flows.Flow, int], Tensor | None]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Error of solvers at a budget of evaluations.")
    parser.add_argument("--all", action="store_true", help="the nine other flows besides")
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    problems = flows.published() + (flows.held_out() if options.all else [])
    exact = {}
    for flow in problems:
        print(f"  reference of {flow.name}", file=sys.stderr, flush=True)
        plan = fs.plan("rk4", nfe=2400, schedule=fs.logistic(4.0))
        exact[flow.name] = fs.solve(flow.velocity, flow.noise, plan=plan).x
    rows = [("solver", "grid", *(str(n) for n in BUDGETS))]
    for solver, grid, run in entries():
        print(f"  {solver} on {grid}", file=sys.stderr, flush=True)
        cells = [cell(problems, exact, run, nfe) for nfe in BUDGETS]
        rows.append((solver, grid, *cells))
    names = ", ".join(flow.name for flow in problems)
    report = "\n\n".join(
        [
            "# Error of solvers at a budget of evaluations",
            "Geometric mean over the flows of the root mean square error over the standard "
            "deviation of the data; float64, diffusers in its own precision. A dash: the method "
            "does not take that many evaluations, or is not installed.",
            f"- flows: {names}\n- date: {datetime.now(UTC):%Y-%m-%d}\n- versions: {versions()}",
            table(rows),
        ]
    )
    print(report)
    if options.write:
        folder = Path(__file__).resolve().parents[1] / "results"
        file = folder / f"solvers-accuracy--{datetime.now(UTC):%Y-%m-%d}.md"
        file.write_text(report + "\n", encoding="utf-8")
        print(f"written to {file}")
    return 0


def cell(
    problems: list[flows.Flow],
    exact: dict[str, Tensor],
    run: Callable[[flows.Flow, int], Tensor | None],
    nfe: int,
) -> str:
    logs: list[float] = []
    for flow in problems:
        found = run(flow, nfe)
        if found is None:
            return "-"
        answer = exact[flow.name]
        error = (found.double() - answer).square().mean().sqrt() / answer.std()
        logs.append(math.log(error.item()))
    return f"{math.exp(sum(logs) / len(logs)):.4f}"


def entries() -> Iterator[Entry]:
    for name, grid in GRIDS.items():
        for solver in OURS:
            yield f"flowsolvers {solver}", name, ours(solver, grid)
        for label, (kind, settings) in SCHEDULERS.items():
            yield label, name, scheduler(kind, settings, grid)
        for method, stages in METHODS.items():
            yield f"torchdiffeq {method}", name, torchdiffeq(method, stages, grid)


def ours(solver: str, grid: fs.Schedule) -> Callable[[flows.Flow, int], Tensor]:
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


def versions() -> str:
    found = []
    for name in ("torch", "flowsolvers", "diffusers", "torchdiffeq"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
