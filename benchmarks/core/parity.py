"""How near the backbone is to the authors' and to diffusers': `python benchmarks/core/parity.py`.

Runs the tests that hold it to tensors recorded from the authors' code and to diffusers' models, and
lists what they compared: the largest difference, and the bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from summary import finish, head, table

TESTS = Path(__file__).resolve().parents[2] / "packages" / "nextdit-core" / "tests"
FILES = ("test_backbone", "test_authors_parity", "test_class_conditional", "test_experts")


class Collected:
    """What the tests recorded."""

    def __init__(self) -> None:
        self.cases: list[tuple[str, float, float]] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """See the end of a test."""
        if report.skipped:
            self.skipped.append(report.nodeid.split("::")[-1].split("[")[0])
        if report.when == "call":
            self.cases += [case for name, case in report.user_properties if name == "parity"]


def rows(cases: list[tuple[str, float, float]]) -> list[tuple[str, ...]]:
    """Put cases of one kind, such as all gradients, into one row."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for case, error, bound in cases:
        kind = case.split(" of ")[0] if case.startswith("gradient") else case
        kind = kind.split(",")[0] if kind.startswith("after a step") else kind
        kinds.setdefault(kind, []).append((error, bound))
    found = [("case", "compared", "largest difference", "bound")]
    for kind, pairs in kinds.items():
        error, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
        found.append((kind, str(len(pairs)), f"{error:.1e}", f"{bound:.1e}"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Differences from the authors' and diffusers'.")
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    options = parser.parse_args()
    collected = Collected()
    files = [str(TESTS / f"{name}.py") for name in FILES]
    failed = pytest.main(["-q", "--no-header", *files], plugins=[collected])
    parts = [
        "# Parity of the backbone",
        head(),
        "The row shows, of all that was compared, what came nearest to its bound.",
        table(rows(collected.cases)),
    ]
    if collected.skipped:
        parts.append("Skipped: " + ", ".join(sorted(set(collected.skipped))) + ".")
    finish(parts, "parity", write=options.write and not failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
