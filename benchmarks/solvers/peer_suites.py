"""Run the test suites of torchdiffeq and torchode with flowsolvers in their place.

    python benchmarks/solvers/peer_suites.py --torchdiffeq ../torchdiffeq
    python benchmarks/solvers/peer_suites.py --torchode ../torchode

The argument is a checkout of the project; its tests are run as they are, from where they are, and
import `flowsolvers.adapters.torchdiffeq` under the name torchdiffeq, or `torchode_shim.py` under
the name torchode. Every test and subtest is counted: passed, failed, or skipped, which is where
the suite itself skips; where torchdiffeq's asks for a method that is refused by name; and where
torchode's is of what flowsolvers has no counterpart for, as `NOT_TRANSLATED` says test by test.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import unittest
import warnings
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torchode_shim

#: The files of torchdiffeq's suite.
FILES = ("api_tests", "event_tests", "gradient_tests", "norm_tests", "odeint_tests")


_MOCKED = (
    "drives torchode's loop with a mocked step method (private init, step, merge_states), whose "
    "states follow from no velocity"
)

#: Tests of torchode's suite that are skipped, and why; with brackets of one set of parameters.
NOT_TRANSLATED: dict[str, str] = {
    "adjoint_test.py::test_evaluates_solution_at_evaluation_points": _MOCKED,
    "adjoint_test.py::test_odes_step_independently": _MOCKED,
    "adjoint_test.py::test_multiple_evaluation_points_in_single_step": _MOCKED,
    "adjoint_test.py::test_multiple_evals_on_the_last_step": _MOCKED,
    "adjoint_test.py::test_terminates_after_max_steps": _MOCKED,
    "adjoint_test.py::test_rejected_steps_continue_at_same_place": _MOCKED,
    "adjoint_test.py::test_value_is_only_saved_when_step_is_accepted": _MOCKED,
    "adjoint_test.py::test_rejection_of_initial_step_does_not_skip_evaluation_at_t_start": _MOCKED,
    "adjoint_test.py::test_stops_on_non_successful_step_method": _MOCKED,
    "adjoint_test.py::test_finished_solves_do_not_update_dt": _MOCKED,
    "adjoint_test.py::test_stops_on_non_successful_adapt_step_size": _MOCKED,
    **{
        f"dtype_stability_test.py::test_data_and_time_dtypes_are_not_mixed[{method}-time_dtype0-"
        "data_dtype0]": (
            "float64 times with float32 data: the velocity gets the time in the state's dtype, "
            "and a cast would only pretend"
        )
        for method in ("Dopri5", "Heun", "Tsit5")
    },
    "step_size_controllers_test.py::test_no_error_estimate_keeps_step_size_constant": (
        "a step without an estimate of its error; embedded pairs always have one"
    ),
    "single_step_methods_test.py::test_evaluates_term_at_correct_nodes": (
        "steps a tableau by torchode's private init and step; its rows do not sum to c, which "
        "Pair refuses"
    ),
    "interpolation_test.py::test_fourth_order_coefficients_from_k": (
        "fits a quartic to a midpoint's weights, which here are in the pair's table"
    ),
}


@dataclass
class Counts:
    """How the tests of one file went."""

    name: str
    passed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0


class Result(unittest.TestResult):
    """Counts subtests as tests, and a test that has them not again."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.parents: set[str] = set()

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        """Count a subtest."""
        self.parents.add(test.id())
        self._note(subtest, err)

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        """Count a test without subtests."""
        if test.id() not in self.parents:
            self._note(test, None)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        """Count a failed test."""
        self._note(test, err)

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        """Count a test that raised."""
        self._note(test, err)

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        """Count a test that its suite skips."""
        self.counts.skipped[reason] += 1

    def _note(self, test: Any, err: Any) -> None:
        if err is None:
            self.counts.passed += 1
        elif isinstance(err[1], ValueError) and "is not carried" in str(err[1]):
            self.counts.skipped[str(err[1]).split(";")[0]] += 1
        else:
            first = (str(err[1]).strip().splitlines() or [""])[0]
            name = test.id().split(".", 1)[1]
            self.counts.failed.append((name, f"{type(err[1]).__name__}: {first}"[:160]))


class Plugin:
    """Skips what is not translated and counts a file of torchode's suite, for pytest."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark what is skipped."""
        for item in items:
            name = f"{item.path.name}::{item.name}"
            reason = NOT_TRANSLATED.get(name) or NOT_TRANSLATED.get(name.split("[")[0])
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that cannot be imported."""
        if report.failed:
            self.counts.failed.append((report.nodeid, str(report.longrepr).strip()[-160:]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test."""
        name = report.nodeid.split("::", 1)[1]
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.counts.skipped[reason] += 1
            self.counts.names.setdefault(reason, []).append(name)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(report.longrepr if crash is None else crash.message).strip().splitlines()[0]
            self.counts.failed.append((name, why[:160]))
        elif report.when == "call":
            self.counts.passed += 1


def run_torchdiffeq(name: str) -> Counts:
    counts = Counts(name)
    begin = time.perf_counter()
    unittest.defaultTestLoader.loadTestsFromName(name).run(Result(counts))
    counts.seconds = time.perf_counter() - begin
    return counts


def run_torchode(path: Path) -> Counts:
    counts = Counts(path.stem)
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-c", "/dev/null"]
    begin = time.perf_counter()
    pytest.main([*options, f"--rootdir={path.parent}", str(path)], plugins=[Plugin(counts)])
    counts.seconds = time.perf_counter() - begin
    return counts


def report(peer: str, checkout: Path, found: list[Counts]) -> str:
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        f"{peer}'s suite at {commit or 'a checkout without git'}, torch {torch.__version__}.",
        "",
        "| file | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|",
    ]
    total = Counts(
        "all",
        sum(c.passed for c in found),
        [failure for c in found for failure in c.failed],
        sum((c.skipped for c in found), Counter[str]()),
        seconds=sum(c.seconds for c in found),
    )
    for c in [*found, total]:
        name, skipped = c.name if c is total else f"{c.name}.py", sum(c.skipped.values())
        lines.append(f"| {name} | {c.passed} | {len(c.failed)} | {skipped} | {c.seconds:.0f} |")
    lines += ["", "Failed:", ""]
    lines += [f"- {c.name}: {name}: {why}" for c in found for name, why in c.failed] or ["- none"]
    lines += ["", "Skipped:", ""]
    names = {why: c.names[why] for c in found for why in c.names}
    lines += [
        f"- {n} times: {why}" + "".join(f"\n  - {name}" for name in names.get(why, []))
        for why, n in total.skipped.most_common()
    ] or ["- none"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--torchdiffeq", type=Path, help="a checkout of torchdiffeq")
    peer.add_argument("--torchode", type=Path, help="a checkout of torchode")
    parser.add_argument("files", nargs="*", help="files of its suite, without .py; all if none")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.torchdiffeq:
        sys.modules["torchdiffeq"] = import_module("flowsolvers.adapters.torchdiffeq")
        sys.path.insert(0, str(options.torchdiffeq / "tests"))
        found = [run_torchdiffeq(name) for name in options.files or FILES]
        print(report("torchdiffeq", options.torchdiffeq, found))
    else:
        torchode_shim.install()
        tests = options.torchode / "tests"
        paths = [tests / f"{name}.py" for name in options.files] or sorted(tests.glob("*_test.py"))
        found = [run_torchode(path) for path in paths]
        print(report("torchode", options.torchode, found))
    return int(any(c.failed for c in found))


if __name__ == "__main__":
    sys.exit(main())
