"""Collect the Python blocks of every README as tests."""

from __future__ import annotations

import os
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# Ray's workers and the tests' own processes share two cores on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md"],
    excludes=[".ci/*", ".venv/*", ".venv-docs/*"],
    path=str(Path(__file__).parent),
).pytest()
