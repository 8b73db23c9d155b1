"""The machine code of QK-norm with rotation, compiled ahead of time."""

import re
from inspect import signature

import pytest
import torch

from nextdit_kernels import qk_norm

# Heads of q and of k, channels of a head, over, norm, dtype, and most registers forward and
# backward. A row of 2304 or 5120 has a tile of its own for the rest after 2048 or 4096; the figures
# are those of ptxas for the worst of the three architectures.
CASES = {
    "lumina-next": (32, 8, 72, "hidden", "layer", "bf16", 128, 168),
    "lumina-next-fp16": (32, 8, 72, "hidden", "layer", "fp16", 128, 168),
    "lumina-next-fp32": (32, 8, 72, "hidden", "layer", "fp32", 168, 208),
    "wan-1.3b": (12, 12, 128, "hidden", "rms", "bf16", 128, 168),
    "wan-14b": (40, 40, 128, "hidden", "rms", "bf16", 128, 168),
    "hidden-3072": (24, 24, 128, "hidden", "layer", "bf16", 128, 168),
    "flux": (24, 24, 128, "head", "rms", "bf16", 80, 112),
    "lumina-2": (24, 8, 96, "head", "rms", "bf16", 80, 112),
    "heads-of-64": (16, 16, 64, "head", "layer", "bf16", 80, 128),
    "heads-of-72": (32, 8, 72, "head", "layer", "bf16", 80, 128),
    "heads-of-128-fp32": (24, 24, 128, "head", "rms", "fp32", 96, 128),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {"forward": "norm_rotate_kernel", "backward": "norm_rotate_backward_kernel"}
CAPABILITIES = (80, 90, 100)


def request_for(name, direction, capability):
    heads, kv_heads, width, over, norm, dtype, *_ = CASES[name]
    kernel = KERNELS[direction]
    names = signature(getattr(qk_norm, kernel).fn).parameters
    q, k = (
        torch.empty(1, 4096, count, width, device="meta", dtype=DTYPES[dtype])
        for count in (heads, kv_heads)
    )
    *_, constants = qk_norm._plan(q, k, norm, over, list(KERNELS).index(direction))
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    constants |= {"VECTOR": 4 if dtype == "fp32" else 8, "TABLE_VECTOR": 4}
    constants |= {n: 1 for n in names if n[-3:] in ("_sd", "_sp")}
    constants |= {n: None for n in names if norm == "rms" and "_bias" in n}
    types = dict.fromkeys(names, "i32") | {"eps": "fp32"}
    types |= {n: f"*{dtype}" for n in names if n.endswith("_ptr")}
    types |= {n: "*fp32" for n in names if re.search(r"(stats|sums|cos|sin)_ptr$", n)}
    return {
        "kernel": f"nextdit_kernels.qk_norm:{kernel}",
        "capability": capability,
        "types": {n: types[n] for n in names},
        "constants": constants,
        "options": options,
    }


def loops(sass):
    """Cut out what lies between a label and a jump back to it."""
    labels, found = {}, []
    lines = sass.splitlines()
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(LBB\d+):", line):
            labels[label[1]] = i
        jump = re.search(r"BRA (LBB\d+)", line)
        if jump and i - labels.get(jump[1], i) > 20:  # the last instruction jumps to itself
            found.append("\n".join(lines[labels[jump[1]] : i]))
    return found


@pytest.fixture(scope="module")
def built(compile_ahead):
    """The code of every case."""
    cases = [(n, d, c) for n in CASES for d in KERNELS for c in CAPABILITIES]
    return dict(zip(cases, compile_ahead([request_for(*case) for case in cases]), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_all(built, name, direction, capability) -> None:
    code = built[name, direction, capability]
    sass = code["sass"]
    from collections import Counter

    ls = loops(sass)
    print(
        [len(x.splitlines()) for x in ls],
        [dict(Counter(re.findall(r"\b(?:LDG|STG)\.\S+", x))) for x in ls],
    )
    print(
        name,
        direction,
        capability,
        "regs",
        code["registers"],
        "sh",
        code["shared"],
        "lines",
        len(sass.splitlines()),
        dict(Counter(re.findall(r"\b(?:LDG|STG)\.\S+", sass))),
        "L2",
        dict(Counter(re.findall(r"\b(?:ld|st)\.global\S*", code["ptx"]))),
    )
    assert code["stack"] == 0
