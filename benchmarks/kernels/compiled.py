"""Report the machine code of every kernel, for GPUs that this machine need not have.

`python benchmarks/kernels/compiled.py [--write]` compiles what the tests compile and prints a table
of registers, shared memory, instructions, width of loads and stores, and matrix instructions. It
says nothing about time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "kernels" / "tests"
CAPABILITIES = {80: "8.0", 90: "9.0", 100: "10.0"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Report the machine code of every kernel.")
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels are only asked for their arguments here
    cases = [case for file in sorted(TESTS.glob("test_*code.py")) for case in cases_of(file)]
    answers = build([request for _, request in cases])
    report = "\n\n".join([head(), table(cases, answers)])
    print(report)
    if options.write:
        folder = ROOT / "benchmarks" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"compiled-kernels--{datetime.now(UTC):%Y-%m-%d}.md"
        file.write_text(report + "\n", encoding="utf-8")
        print(f"written to {file}")
    return 0


def cases_of(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the label and the request of each case that a test file compiles."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for case in module.COMPILED if hasattr(module, "COMPILED") else module.CASES:
        request = module.request_for(*case)
        parts = list(case)
        parts.remove(request["capability"])  # has a column of its own
        yield " ".join(map(str, parts)), request


def build(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "compile_ahead.py")],
        input=json.dumps(requests),
        env=environment,
        capture_output=True,  # the disassembler warns of every file
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def head() -> str:
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    return "\n".join(
        [
            "# Machine code of the kernels",
            "",
            "Compiled ahead of time; nothing was timed. Instructions are those of the whole "
            "program, unrolled loops included; registers and stack are of one thread.",
            "",
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            f"- commit: {commit or 'unknown'}",
            f"- triton: {triton.__version__}, with its own ptxas",
        ]
    )


def table(cases: list[tuple[str, dict[str, Any]]], answers: list[dict[str, Any]]) -> str:
    rows = [
        *("| kernel | case | capability | registers | stack | shared, bytes | instructions "
          "| global loads and stores | matrix products |",),
        "|---" * 9 + "|",
    ]  # fmt: skip
    for (label, request), code in zip(cases, answers, strict=True):
        sass, ptx = code["sass"], code["ptx"]
        instructions = len(sass.splitlines())
        memory = Counter(re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S+", sass))
        products = Counter(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
        rows.append(
            "| "
            + " | ".join(
                [
                    request["kernel"].removeprefix("nextdit_kernels.").replace(":", " "),
                    label,
                    CAPABILITIES[request["capability"]],
                    str(code["registers"]),
                    str(code["stack"]),
                    str(code["shared"]),
                    str(instructions),
                    ", ".join(f"{n} {name}" for name, n in sorted(memory.items())),
                    ", ".join(f"{n} {name}" for name, n in sorted(products.items())) or "-",
                ]
            )
            + " |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
