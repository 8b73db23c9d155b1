"""What a step costs besides the model: `python benchmarks/solvers/overhead.py`.

The velocity returns its argument, so that all that is timed is the solver. Microseconds a step, the
least of many runs that take turns; aten operations and reads of a device value a step are counted
by a dispatch mode, and graph breaks by torch.compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from report import table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolvers as fs

SHAPES = ((1, 16), (2, 4, 128, 128))
STEPS = 50
_RUNS = 8  # in a turn; the first of them meets cold caches
OURS = ("auto", "euler", "midpoint", "rk4", "ab2", "pec1", "pec2", "pec3", "res2", "unipc2")
SYNCS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")


@dataclass(frozen=True)
class Case:
    """A solver on a state.

    Args:
        name: Of the solver.
        run: Solves once.
        steps: How many steps that takes.
    """

    name: str
    run: Callable[[], object]
    steps: int


def identity(t: Tensor, x: Tensor) -> Tensor:
    """Be no model at all."""
    return x


def cases(shape: tuple[int, ...]) -> list[Case]:
    """Make every case for a shape."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = [Case("additions alone, as Euler's", lambda: _additions(x), STEPS)]
    for solver in OURS:
        plan = fs.plan(solver, nfe=STEPS * getattr(fs.method(solver), "stages", 1))
        found.append(Case(f"flowsolvers {solver}", _ours(x, plan), STEPS))
    found.append(Case("flowsolvers auto at 20", _ours(x, fs.plan(nfe=20)), 20))
    return found + _torchdiffeq(x) + _diffusers(x)


def _additions(x: Tensor) -> None:
    for _ in range(STEPS):
        x = x.add(identity(x, x), alpha=0.02)


def _ours(x: Tensor, plan: fs.Plan) -> Callable[[], object]:
    return lambda: fs.solve(identity, x, plan=plan)


def _torchdiffeq(x: Tensor) -> list[Case]:
    try:
        from torchdiffeq import odeint
    except ImportError:
        return []
    times = torch.linspace(0, 1, STEPS + 1)
    return [
        Case(f"torchdiffeq {m}", lambda m=m: odeint(identity, x, times, method=m), STEPS)
        for m in ("euler", "midpoint", "rk4", "explicit_adams")
    ]


def _diffusers(x: Tensor) -> list[Case]:
    try:
        import diffusers
    except ImportError:
        return []
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    schedulers = [
        ("FlowMatchEuler", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("DPM++ 2M", diffusers.DPMSolverMultistepScheduler(**settings)),
        ("UniPC 2", diffusers.UniPCMultistepScheduler(**settings)),
    ]

    def drive(scheduler: object) -> Callable[[], object]:
        def run() -> Tensor:
            scheduler.set_timesteps(STEPS)
            scheduler.set_begin_index(0)
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(identity(t, y), t, y, return_dict=False)[0]
            return y

        return run

    return [Case(f"diffusers {name}", drive(one), STEPS) for name, one in schedulers]


class Counter(TorchDispatchMode):
    """Count operations, and those that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one."""
        name = func.overloadpacket.__name__
        self.operations += name != "detach"
        self.reads += name in SYNCS
        return func(*args, **(kwargs or {}))


def counts(case: Case) -> tuple[float, float]:
    """Count operations and reads a step."""
    case.run()
    with Counter() as counter:
        case.run()
    return counter.operations / case.steps, counter.reads / case.steps


def breaks(solver: str) -> str:
    """Count what torch.compile cannot put into one graph."""
    plan = fs.plan(solver, nfe=8)
    torch._dynamo.reset()
    found = torch._dynamo.explain(lambda x: fs.solve(identity, x, plan=plan).x)(torch.ones(4))
    return str(found.graph_break_count)


def times(found: list[Case], rounds: int) -> list[float]:
    """Time cases in turns; the least of all rounds, in microseconds a step."""
    least = [float("inf")] * len(found)
    for _ in range(rounds):
        for i, case in enumerate(found):
            for _ in range(_RUNS):
                begun = time.perf_counter()
                case.run()
                least[i] = min(least[i], time.perf_counter() - begun)
    return [seconds / case.steps * 1e6 for seconds, case in zip(least, found, strict=True)]


def report(rounds: int = 60) -> str:
    """Make the table."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    small, large = (cases(shape) for shape in SHAPES)
    of_small, of_large = times(small, rounds), times(large, max(rounds // 8, 1))
    head = ("solver", *(f"{shape}, us" for shape in SHAPES), "operations", "reads", "graph breaks")
    rows = [tuple(map(str, head))]
    for case, a, b in zip(small, of_small, of_large, strict=True):
        operations, reads = counts(case)
        ours = case.name.startswith("flowsolvers")
        graph = breaks(case.name.split()[1]) if ours else ""
        rows.append((case.name, f"{a:.1f}", f"{b:.0f}", f"{operations:.2f}", f"{reads:.2f}", graph))
    euler = dict(zip((case.name for case in small), of_small, strict=True))
    notes = [
        f"{peer} takes {euler[peer] / euler['flowsolvers euler']:.1f} times as long as our euler"
        for peer in ("torchdiffeq euler", "diffusers UniPC 2")
        if peer in euler
    ]
    return "\n\n".join(
        [
            "## Overhead",
            f"Per step, {STEPS} steps in a solve, CPU with one thread, float32, velocity = x: "
            "least of many runs in turns. For ours the plan is made before, and the look whether "
            "the end is finite is inside; for diffusers `set_timesteps` is inside.",
            table(rows),
            "; ".join(notes) + "." if notes else "",
        ]
    )


if __name__ == "__main__":
    print(report())
