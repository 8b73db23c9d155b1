"""The recorded tensors of the released code."""

import os
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
