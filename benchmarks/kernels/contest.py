"""A contest: several ways to compute the same, checked against one another and timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


@dataclass
class Contest:
    """What is compared, at one shape.

    Args:
        what: The operation, as in "rotation, forward".
        shape: The shape, as it stands in the table.
        exact: The result in float64 or float32, a tensor or several.
        tolerance: Largest difference from `exact`, relative to its largest number.
        moved: Bytes that the problem must read and write; 0 where operations bound it.
        operations: Floating-point operations that the problem needs; 0 where bytes bound it.
        runs: Each way by its name; a string instead says why it does not run.
    """

    what: str
    shape: str
    exact: Any
    tolerance: float
    moved: int = 0
    operations: int = 0
    runs: dict[str, Run | str] = field(default_factory=dict)

    def enter(self, name: str, build: Callable[[], Run], exact: Any = None) -> None:
        """Add a way to compute; one that is not installed, fails or is wrong says so.

        Args:
            name: As it stands in the table.
            build: Gives what is timed.
            exact: The result where it is not that of the others, as in another layout.
        """
        try:
            run = build()
            error = largest_error(run(), self.exact if exact is None else exact)
        except ImportError as absent:
            self.runs[name] = f"not installed ({absent.name or absent})"
        except Exception as failure:  # a competitor may refuse in its own way
            said = (str(failure).strip().splitlines() or [""])[0][:80]
            self.runs[name] = f"failed: {type(failure).__name__}: {said}"
        else:
            fits = error <= self.tolerance  # also refuses NaN
            self.runs[name] = run if fits else f"wrong by {error:.2g}"


def largest_error(found: Any, exact: Any) -> float:
    """Give the largest difference, relative to the largest number that should be there."""
    found, exact = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, exact))
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, exact, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


def backward(outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor], grads: Any) -> Run:
    """Give the run of a backward pass over a graph that is kept."""
    return partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True)


def timed(runs: dict[str, Run], rounds: int, *, smoke: bool) -> dict[str, list[float]]:
    """Run each in turn, round after round, from a cold L2 cache; give the seconds of each."""
    for run in runs.values():  # compiles, and fills the allocator
        for _ in range(1 if smoke else 3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    if smoke:
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
        return times
    cold = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cold.zero_()  # also lets the host run ahead of the device
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def host_time(run: Run, *, smoke: bool) -> float:
    """Give the seconds that the host spends in one call, device idle before each.

    Median of 100, of fewer where they take more than a second.
    """
    times: list[float] = []
    end = time.perf_counter() + 1
    for _ in range(2 if smoke else 100):
        if times and time.perf_counter() > end:
            break
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        if not smoke:
            torch.cuda.synchronize()
    return statistics.median(times)


def table(
    contests: Iterable[Iterable[Contest]], rounds: int, deadline: float, *, smoke: bool
) -> str:
    """Time contests one after another and give the table as Markdown.

    A shape that fails, or for which no time is left, says so and leaves the others alone.
    """
    device = "cpu" if smoke else "cuda"
    size = 64 if smoke else 8192
    factors = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    head = ("what", "shape", "who", "µs", "20 % – 80 %", "GB/s", "of copy", "TFLOP/s", "of matmul")
    rows = [(*head, "host µs")]
    for shape in contests:
        try:
            for contest in shape:
                if time.time() > deadline:
                    rows.append((contest.what, contest.shape, "no time left", *[""] * 7))
                    break
                rows += timed_rows(contest, factors, size, rounds, smoke=smoke)
        except Exception as failure:  # out of memory, or a compiler's fault
            said = (str(failure).strip().splitlines() or [""])[0][:80]
            rows.append((f"failed: {type(failure).__name__}: {said}", *[""] * 9))
        if time.time() > deadline:
            rows.append(("no time left for other shapes", *[""] * 9))
            break
    return markdown(rows)


def timed_rows(
    contest: Contest, factors: Tensor, size: int, rounds: int, *, smoke: bool
) -> list[tuple[str, ...]]:
    """Time a contest and give its rows."""
    rows: list[tuple[str, ...]] = []
    device = factors.device
    print(f"  {contest.what} {contest.shape}", flush=True)
    yardsticks: dict[str, Run] = {}
    if contest.moved:
        source = torch.randint(256, (contest.moved // 2,), dtype=torch.uint8, device=device)
        yardsticks["device copy"] = partial(torch.empty_like(source).copy_, source)
    if contest.operations:
        yardsticks["matmul"] = partial(torch.matmul, factors[0], factors[1])
    entered = {name: run for name, run in contest.runs.items() if not isinstance(run, str)}
    times = timed(yardsticks | entered, rounds, smoke=smoke)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in (*yardsticks, *contest.runs):
        if name not in times:
            rows.append((contest.what, contest.shape, name, str(contest.runs[name]), *[""] * 6))
            continue
        own = 2 * size**3 if name == "matmul" else contest.operations
        seconds = medians[name]
        bytes_rate = f"{contest.moved / seconds / 1e9:.0f}" if contest.moved else ""
        of_copy = f"{medians['device copy'] / seconds:.2f}" if contest.moved else ""
        rate = own / seconds / 1e12
        best = 2 * size**3 / medians["matmul"] / 1e12 if contest.operations else 0.0
        low, high = quantiles(times[name])
        host = host_time((yardsticks | entered)[name], smoke=smoke)
        rows.append(
            (
                *(contest.what, contest.shape, name, f"{seconds * 1e6:.1f}"),
                f"{low * 1e6:.1f} – {high * 1e6:.1f}",
                *("" if name == "matmul" else cell for cell in (bytes_rate, of_copy)),
                f"{rate:.0f}" if contest.operations and name != "device copy" else "",
                f"{rate / best:.2f}" if contest.operations and name != "device copy" else "",
                f"{host * 1e6:.1f}",
            )
        )
    return rows


def quantiles(values: list[float]) -> tuple[float, float]:
    """Give the times that 20 % and 80 % of the runs stay below."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write rows as a Markdown table, the first one as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
