"""Compare what each distribution imports with what it declares (deptry, package by package)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run deptry in every distribution's folder; give the number of those that fail."""
    failed = 0
    for folder in [*sorted((ROOT / "packages").iterdir()), ROOT / "kernels"]:
        found = subprocess.run(
            [sys.executable, "-m", "deptry", "src", "--no-ansi"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        print(f"{folder.name}: {'declares what it imports' if not found.returncode else 'FAILS'}")
        if found.returncode:
            print(found.stdout + found.stderr)
            failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
