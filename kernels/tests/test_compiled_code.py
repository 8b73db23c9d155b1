"""The machine code of rotation and SwiGLU, compiled ahead of time."""

import math
import re
from inspect import signature

import pytest
from triton import next_power_of_2

from nextdit_kernels import glu, rotary


def rotary_constants(width, vector):
    block = max(16, next_power_of_2(width))
    return {
        "D": width,
        "CONJUGATE": True,
        "IN_PLACE": False,
        "VECTOR": vector,
        "TABLE_VECTOR": math.gcd(4, width // 2),
        "BLOCK_H": rotary._HEADS,
        "BLOCK_T": rotary._TILE // block,
        "BLOCK_D": block,
    }


def glu_constants(width, vector):
    block = min(glu._WIDE, max(16, next_power_of_2(width)))
    return {"W": width, "VECTOR": vector, "BLOCK_T": glu._TILE // block, "BLOCK_W": block}


def in_place_constants(width, vector):
    return rotary_constants(width, vector) | {"IN_PLACE": True}


KERNELS = {
    "rotary-in-place": ("rotary:rotate_qk_kernel", in_place_constants),
    "rotary": ("rotary:rotate_qk_kernel", rotary_constants),
    "swiglu": ("glu:swiglu_kernel", glu_constants),
    "swiglu-backward": ("glu:swiglu_backward_kernel", glu_constants),
}
CASES = [
    (kernel, capability, dtype, width, 4 if dtype == "fp32" else 8)
    for capability in (80, 90, 100)
    for kernel, dtype, width in [
        *(("rotary", "bf16", width) for width in (24, 64, 72, 96, 128, 256)),
        *(("rotary-in-place", "bf16", width) for width in (72, 128)),
        *(("rotary", "fp16", 72), ("rotary", "fp32", 72)),
        *(("swiglu", "bf16", width) for width in (96, 1536, 6144)),
        *(("swiglu", "fp16", 1536), ("swiglu", "fp32", 1536)),
        *(("swiglu-backward", "bf16", width) for width in (96, 1536, 6144)),
        *(("swiglu-backward", "fp16", 1536), ("swiglu-backward", "fp32", 1536)),
    ]
]
UNALIGNED = ("rotary", 90, "bf16", 72, 1)


def request_for(kernel, capability, dtype, width, vector):
    name, constants_of = KERNELS[kernel]
    module, function = name.split(":")
    names = signature(getattr({"rotary": rotary, "glu": glu}[module], function).fn).parameters
    constants = constants_of(width, vector)
    constants |= {name: 1 for name in names if name[-3:] in ("_sd", "_sp", "_sw")}
    types = dict.fromkeys(names, "i32")
    types |= {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    types |= {name: "*fp32" for name in names if name in ("cos_ptr", "sin_ptr")}
    return {
        "kernel": f"nextdit_kernels.{name}",
        "capability": capability,
        "types": types,
        "constants": constants,
    }


@pytest.fixture(scope="module")
def built(compile_ahead):
    """The code of every case."""
    cases = [*CASES, UNALIGNED]
    return dict(zip(cases, compile_ahead([request_for(*case) for case in cases]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-sm{}-{}-{}-{}".format(*case))
def test_wide_loads_and_no_local_memory(built, case) -> None:
    code = built[case]
    ptx, sass = code["ptx"], code["sass"]
    assert ".local" not in ptx
    assert code["stack"] == 0
    assert not re.findall(r"\b(?:LDL|STL)\b", sass)
    assert set(re.findall(r"\b(?:ld|st)\.global\S*", ptx)) == {
        "ld.global.v4.b32",
        "st.global.v4.b32",
    }
    assert set(re.findall(r"\b(?:LDG|STG)\.\S+", sass)) == {"LDG.E.128", "STG.E.128"}


def test_without_the_alignment_hint_loads_are_two_bytes(built) -> None:
    assert "LDG.E.U16" in built[UNALIGNED]["sass"]
