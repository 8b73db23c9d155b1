"""The same numbers as others: `python benchmarks/solvers/parity.py`.

The largest difference over the published flows, at the same times, to what somebody else's code
gives. Where a peer is not installed its rows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import flows
import torch
from report import table
from torch import Tensor

import flowsolvers as fs
from flowsolvers.exponential import UniPC

STEPS = (4, 10, 20)

#: log-SNR is infinite at noise, where diffusers starts a little later.
LATE = 0.001


def differences() -> Iterator[tuple[str, str, float]]:
    """Give ours, theirs and the largest difference."""
    problems = flows.published()
    yield from _torchdiffeq(problems)
    yield from _diffusers(problems)


def _worst(
    problems: list[flows.Flow], ours: Callable[..., Tensor], theirs: Callable[..., Tensor]
) -> float:
    found = 0.0
    for flow in problems:
        for steps in STEPS:
            difference = (ours(flow, steps).double() - theirs(flow, steps).double()).abs().max()
            found = max(found, difference.item())
    return found


def _torchdiffeq(problems: list[flows.Flow]) -> Iterator[tuple[str, str, float]]:
    try:
        from torchdiffeq import odeint
    except ImportError:
        return
    grid = fs.shift(2.0)
    for ours, method in (
        ("euler", "euler"),
        ("midpoint", "midpoint"),
        ("heun", "heun2"),
        ("heun3", "heun3"),
        ("rk38", "rk4"),
    ):
        stages = fs.method(ours).stages

        def our(flow: flows.Flow, steps: int, ours: str = ours, stages: int = stages) -> Tensor:
            nfe = steps * stages
            return fs.solve(flow.velocity, flow.noise, nfe=nfe, solver=ours, schedule=grid).x

        def their(flow: flows.Flow, steps: int, method: str = method) -> Tensor:
            times = torch.tensor(grid.grid(steps), dtype=torch.float64)
            return odeint(flow.velocity, flow.noise, times, method=method)[-1]

        yield ours, f"torchdiffeq {method}", _worst(problems, our, their)


def _diffusers(problems: list[flows.Flow]) -> Iterator[tuple[str, str, float]]:
    try:
        import diffusers
    except ImportError:
        return
    single = [
        flows.Flow(flow.name, flow.velocity, flow.noise.float().double()) for flow in problems
    ]

    def euler(flow: flows.Flow, steps: int) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        x = flow.noise.float()
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            x = scheduler.step(-flow.velocity(1.0 - sigma, x), t, x, return_dict=False)[0]
        return x

    def our_euler(flow: flows.Flow, steps: int) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        # Theirs starts at noise and takes differences of sigmas in float32.
        sigmas = scheduler.sigmas
        steps_ = [
            fs.Step(
                1.0 - a.item(),
                1.0 - b.item(),
                (fs.Row(1.0 - a.item(), ()),),
                ((a - b).item(),),
            )
            for a, b in pairwise(sigmas)
        ]
        plan = fs.Plan("euler", "diffusers", tuple(steps_))
        return fs.solve(flow.velocity, flow.noise.float(), plan=plan).x

    yield "euler, float32", "diffusers FlowMatchEuler", _worst(single, our_euler, euler)
    for label, kind, order in (
        ("unipc2", "UniPCMultistepScheduler", 2),
        ("unipc3", "UniPCMultistepScheduler", 3),
        ("dpm2m", "DPMSolverMultistepScheduler", 2),
    ):

        def times(steps: int) -> tuple[float, ...]:
            return (LATE, *fs.logistic(4.0).grid(steps)[1:])

        def our(flow: flows.Flow, steps: int, label: str = label, order: int = order) -> Tensor:
            method = UniPC(order) if label.startswith("unipc") else fs.method(label)
            laid_out = method.lay_out(steps, lambda n: times(n))
            return fs.solve(flow.velocity, flow.noise, plan=fs.Plan(label, "late", laid_out)).x

        def their(flow: flows.Flow, steps: int, kind: str = kind, order: int = order) -> Tensor:
            scheduler = getattr(diffusers, kind)(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=1.0,
                solver_order=order,
                final_sigmas_type="zero",
            )
            scheduler.set_timesteps(steps)
            scheduler.sigmas = 1.0 - torch.tensor(times(steps), dtype=torch.float64)
            scheduler.timesteps = scheduler.sigmas[:-1] * 1000
            scheduler.set_begin_index(0)
            x = flow.noise
            for t, timestep in zip(times(steps), scheduler.timesteps, strict=False):
                v = flow.velocity(torch.tensor(t, dtype=torch.float64), x)
                x = scheduler.step(-v, timestep, x, return_dict=False)[0].double()
            return x

        yield label, f"diffusers {kind} {order}, float times", _worst(problems, our, their)


def report() -> str:
    """Make the table."""
    torch.set_grad_enabled(False)
    rows = [("ours", "theirs", "largest difference")]
    rows += [(ours, theirs, f"{worst:.1e}") for ours, theirs, worst in differences()]
    return "\n\n".join(
        [
            "## Parity",
            f"Largest difference of a number at the end, over the four published flows at "
            f"{', '.join(map(str, STEPS))} steps, at the same times.",
            table(rows),
        ]
    )


if __name__ == "__main__":
    print(report())
