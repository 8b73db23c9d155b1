"""How the default's rules were found: `python benchmarks/solvers/search.py --nfe 6`.

A rule's cost is the mean over training flows of log(error / error of Euler's method on even steps),
and besides PENALTY times the mean of its positive part, for flows that the rule makes worse. The
flows of the tables are not among them. Minutes for a budget; prints every improvement, and in the
end what the best rule gives on flows drawn from another seed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple

import torch
from scipy.optimize import minimize
from torch import Tensor
from training import Stack, drawn, stacks

import flowsolvers as fs
from flowsolvers.auto import AUTO, Auto, Rule

#: Least and most of what is searched: velocities, trust, last, shift, slope, limit.
BOUNDS = ((1.0, 3.0), (0.1, 1.0), (0.3, 1.6), (0.7, 2.0), (0.0, 4.0), (0.0, 12.0))
#: First changes of each.
STEPS = (0.25, -0.15, 0.15, 0.1, 0.4, 0.5)


class Training:
    """Flows drawn from a seed, with their answers.

    Args:
        seed: Of the flows.
        count: How many.
        nfe: The budget, for the errors of Euler's method.
    """

    def __init__(self, seed: int, count: int, nfe: int) -> None:
        self.stacks = stacks(drawn(seed, count))
        self.answers = [self._solve(one, fs.plan("rk4", nfe=1600)) for one in self.stacks]
        self.guided = torch.tensor([bool(d.scale) for one in self.stacks for d in one.draws])
        self.euler = self.errors(fs.plan("euler", nfe=nfe))

    def _solve(self, stack: Stack, plan: fs.Plan) -> Tensor:
        """Solve with every sample of every draw along the first dimension."""
        shape = stack.noise.shape

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return stack.velocity(t, x.view(shape)).flatten(0, 1)

        return fs.solve(velocity, stack.noise.flatten(0, 1), plan=plan).x.view(shape)

    def errors(self, plan: fs.Plan) -> Tensor:
        """Give each flow's."""
        pairs = zip(self.stacks, self.answers, strict=True)
        return torch.cat([one.errors(self._solve(one, plan), answer) for one, answer in pairs])

    def ratios(self, rule: Rule) -> Tensor:
        """Give each flow's error over that of Euler's method."""
        solver = Auto((rule,))
        grid = solver.default_schedule(rule.nfe)
        steps = solver.lay_out(rule.nfe, grid.grid)
        return self.errors(fs.Plan("auto", grid.name, steps)) / self.euler

    def say(self, rule: Rule) -> str:
        """Sum up a rule in a line."""
        ratios = self.ratios(rule)
        logs = ratios.log()
        return (
            f"{_short(rule)}: {logs.mean().exp():.4f} of Euler's error, plain "
            f"{logs[~self.guided].mean().exp():.3f}, guided {logs[self.guided].mean().exp():.3f}; "
            f"95 of 100 flows below {ratios.quantile(0.95):.2f}, worst {ratios.max():.2f}; "
            f"{(ratios > 1.2).sum()} of {len(ratios)} above 1.2"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Search the default's rule for a budget.")
    parser.add_argument("--nfe", type=int, required=True)
    parser.add_argument("--penalty", type=float, default=1.0)
    parser.add_argument("--flows", type=int, default=240)
    parser.add_argument("--tries", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(0, options.flows, options.nfe)
    best = float("inf")

    def cost(numbers: list[float]) -> float:
        nonlocal best
        if not all(a <= x <= b for x, (a, b) in zip(numbers, BOUNDS, strict=True)):
            return 1e3
        rule = Rule(options.nfe, *map(float, numbers))
        logs = training.ratios(rule).log()
        found = (logs.mean() + options.penalty * logs.clamp_min(0.0).mean()).item()
        if found < best:
            best = found
            print(f"{found:.4f}  {training.say(rule)}", flush=True)
        return found

    known = next((rule for rule in AUTO.rules if options.nfe <= rule.nfe), AUTO.rules[-1])
    start = astuple(known)[1:]
    simplex = [start]
    for i, step in enumerate(STEPS):
        low, high = BOUNDS[i]
        moved = start[i] + step if low <= start[i] + step <= high else start[i] - step
        simplex.append((*start[:i], moved, *start[i + 1 :]))
    found = minimize(
        cost,
        start,
        method="Nelder-Mead",
        options={"maxfev": options.tries, "initial_simplex": simplex},
    )
    rule = Rule(options.nfe, *map(float, found.x))
    print("on other flows:", Training(1, options.flows, options.nfe).say(rule))
    return 0


def _short(rule: Rule) -> str:
    return ", ".join(f"{number:.3g}" for number in astuple(rule))


if __name__ == "__main__":
    sys.exit(main())
