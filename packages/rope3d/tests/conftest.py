"""The recorded tensors of the released code, and how far we are from other projects."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def golden() -> Path:
    named = os.environ.get("NEXTDIT_GOLDEN")
    places = [Path(named)] if named else [p / "shared/golden" for p in Path(__file__).parents]
    found = [place for place in places if (place / "rope_tables_hd32.safetensors").exists()]
    if not found:
        pytest.skip("no golden tensors: set NEXTDIT_GOLDEN to the folder that holds them")
    return found[0]


@pytest.fixture
def apart(record_property) -> Callable[..., None]:
    """Record and bound the largest difference of two tuples of tensors.

    `benchmarks/tables.py` runs these tests and prints what they record.
    """

    def measure(layout: str, source: str, ours, theirs, tolerance: float) -> None:
        pairs = zip(ours, theirs, strict=True)
        difference = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
        record_property("apart", (layout, source, difference))
        assert difference <= tolerance

    return measure
