"""The machine code of QK-norm with rotation, compiled ahead of time."""

import re
from collections import Counter
from inspect import signature

import pytest
import torch

from nextdit_kernels import qk_norm

CASES = {  # heads of q and of k, channels of a head, norm, over, dtype
    "lumina-next": (32, 8, 72, "layer", "hidden", torch.bfloat16),
    "lumina-next-fp32": (32, 8, 72, "layer", "hidden", torch.float32),
    "hidden-3072": (24, 24, 128, "layer", "hidden", torch.bfloat16),
    "flux": (24, 24, 128, "rms", "head", torch.bfloat16),
    "lumina-2": (24, 8, 96, "rms", "head", torch.bfloat16),
    "heads-of-64": (16, 16, 64, "layer", "head", torch.bfloat16),
    "heads-of-72": (32, 8, 72, "layer", "head", torch.float16),
}
REGISTERS = {  # of a thread at most: forward, backward
    "lumina-next": (128, 168),
    "lumina-next-fp32": (168, 232),
    "hidden-3072": (128, 168),
    "flux": (64, 128),
    "lumina-2": (64, 128),
    "heads-of-64": (80, 128),
    "heads-of-72": (80, 128),
}
KERNELS = {"forward": "norm_rotate_kernel", "backward": "norm_rotate_backward_kernel"}
CAPABILITIES = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDTHS = {"U16": 2, "64": 8, "128": 16}  # bytes; 4 where the instruction says nothing

COMPILED = [(n, d, c) for n in CASES for d in KERNELS for c in CAPABILITIES]


def request_for(name, direction, capability):
    heads, kv_heads, width, norm, over, dtype = CASES[name]
    kernel = KERNELS[direction]
    names = signature(getattr(qk_norm, kernel).fn).parameters
    q, k = (
        torch.empty(1, 4096, count, width, dtype=dtype, device="meta")
        for count in (heads, kv_heads)
    )
    *_, constants = qk_norm._plan(q, k, norm, over, list(KERNELS).index(direction))
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    tables = ((width // 2, 1),)
    constants |= qk_norm._hints((q.stride(), k.stride()), tables, width, q.itemsize)
    constants |= {n: 1 for n in names if n[-3:] in ("_sd", "_sp")}
    constants |= {n: None for n in names if norm == "rms" and "_bias" in n}
    types = dict.fromkeys(names, "i32") | {"eps": "fp32"}
    types |= {n: TYPES[dtype] for n in names if n.endswith("_ptr")}
    types |= {n: "*fp32" for n in names if re.search(r"(stats|sums|cos|sin)_ptr$", n)}
    return {
        "kernel": f"nextdit_kernels.qk_norm:{kernel}",
        "capability": capability,
        "types": {n: types[n] for n in names},
        "constants": constants,
        "options": options,
    }


@pytest.fixture(scope="module")
def built(compile_ahead):
    """The code of every case."""
    return dict(
        zip(COMPILED, compile_ahead([request_for(*case) for case in COMPILED]), strict=True)
    )


def accesses(sass, instruction):
    """Count the global accesses of a thread by their bytes."""
    found = re.findall(rf"\b{instruction}\.E(?:\.(\w+))?", sass)
    return Counter(WIDTHS.get(width, 4) for width in found)


each_case = pytest.mark.parametrize("name", CASES)
each_direction = pytest.mark.parametrize("direction", KERNELS)
each_capability = pytest.mark.parametrize("capability", CAPABILITIES)


@each_capability
@each_direction
@each_case
def test_registers_hold_everything(built, name, direction, capability) -> None:
    code = built[name, direction, capability]
    assert ".local" not in code["ptx"]
    assert code["stack"] == 0
    assert not re.findall(r"\b(?:LDL|STL)\b", code["sass"])
    assert code["registers"] <= REGISTERS[name][list(KERNELS).index(direction)]
    assert code["shared"] <= 16384


@each_capability
@each_direction
@each_case
def test_tensors_are_read_16_bytes_at_a_time(built, name, direction, capability) -> None:
    heads, _, width, norm, over, dtype = CASES[name]
    sass = built[name, direction, capability]["sass"]
    loads, stores = accesses(sass, "LDG"), accesses(sass, "STG")
    tensors = 1 if direction == "forward" else 2
    each = 16 * dtype.itemsize // 16  # loads of 16 bytes for the 16 numbers of a thread
    # Of q and k: x, and dy in the backward pass; cosines and sines, 8 numbers of each.
    assert loads[16] >= 2 * (tensors * each + 4)
    assert stores[16] >= 2 * each
    if qk_norm._tiles(qk_norm._width(torch.empty(heads, width), over))[1]:
        # The rest of a row is narrow: its 256 or 64 channels are 4 bytes for each thread.
        wide = 16 * (loads[16] + stores[16])
        assert wide >= 0.75 * sum(b * n for c in (loads, stores) for b, n in c.items())
        return
    parameters = 2 * (2 if norm == "layer" else 1)  # loaded once, 1 or 2 channels by each thread
    statistics = 2 * (2 if norm == "layer" else 1)  # a number for each group, q and k
    if direction == "forward":
        assert sum(loads.values()) - loads[16] <= parameters
        assert sum(stores.values()) - stores[16] <= statistics
    else:  # at most two groups for each thread
        assert sum(loads.values()) - loads[16] <= 2 * statistics + parameters
        assert sum(stores.values()) - stores[16] <= parameters
