"""The machine code, compiled ahead of time for GPUs that this machine need not have."""

import json
import os
import re
import subprocess
import sys

import pytest

# Runs in its own process: in this one the kernel may belong to Triton's interpreter.
COMPILE = """
import json, math, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nextdit_kernels import glu, rotary

def rotary_constants(width, vector):
    block = max(16, 1 << (width - 1).bit_length())
    return {
        "D": width, "CONJUGATE": True, "VECTOR": vector, "TABLE_VECTOR": math.gcd(4, width // 2),
        "BLOCK_H": rotary._HEADS, "BLOCK_T": rotary._TILE // block, "BLOCK_D": block,
    }

def glu_constants(width, vector):
    block = min(glu._WIDE, max(16, 1 << (width - 1).bit_length()))
    return {"W": width, "VECTOR": vector, "BLOCK_T": glu._TILE // block, "BLOCK_W": block}

KERNELS = {
    "rotary": (rotary.rotate_qk_kernel, rotary_constants),
    "swiglu": (glu.swiglu_kernel, glu_constants),
    "swiglu-backward": (glu.swiglu_backward_kernel, glu_constants),
}
built = []
for name, capability, dtype, width, vector in json.loads(sys.argv[1]):
    kernel, constants_of = KERNELS[name]
    constants = constants_of(width, vector)
    constants |= {name: 1 for name in kernel.arg_names if name[-3:] in ("_sd", "_sp", "_sw")}
    types, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr"):
            types[name] = "*" + ("fp32" if name[:3] in ("cos", "sin") else dtype)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "constexpr" if name in constants else "i32"
    code = compile(
        ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", capability, 32)
    ).asm
    built.append([code["ptx"], code["sass"]])
print(json.dumps(built))
"""
CASES = [
    (kernel, capability, dtype, width, 4 if dtype == "fp32" else 8)
    for capability in (80, 90)
    for kernel, dtype, width in [
        *(("rotary", "bf16", width) for width in (24, 64, 72, 96, 128, 256)),
        *(("rotary", "fp16", 72), ("rotary", "fp32", 72)),
        *(("swiglu", "bf16", width) for width in (96, 1536, 6144)),
        *(("swiglu", "fp16", 1536), ("swiglu", "fp32", 1536)),
        *(("swiglu-backward", "bf16", width) for width in (96, 1536, 6144)),
        *(("swiglu-backward", "fp16", 1536), ("swiglu-backward", "fp32", 1536)),
    ]
]
UNALIGNED = ("rotary", 90, "bf16", 72, 1)


@pytest.fixture(scope="module")
def built():
    """PTX and SASS of every case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cases = [*CASES, UNALIGNED]
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-sm{}-{}-{}-{}".format(*case))
def test_wide_loads_and_no_local_memory(built, case) -> None:
    ptx, sass = built[case]
    assert ".local" not in ptx
    assert not re.findall(r"\b(?:LDL|STL)\b", sass)
    assert set(re.findall(r"\b(?:ld|st)\.global\S*", ptx)) == {
        "ld.global.v4.b32",
        "st.global.v4.b32",
    }
    assert set(re.findall(r"\b(?:LDG|STG)\.\S+", sass)) == {"LDG.E.128", "STG.E.128"}


def test_without_the_alignment_hint_loads_are_two_bytes(built) -> None:
    assert "LDG.E.U16" in built[UNALIGNED][1]
