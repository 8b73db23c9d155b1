"""The machine code of the norms around a layer, compiled ahead of time."""

import re
from inspect import signature

import pytest

from nextdit_kernels import sandwich

WIDTHS = (96, 576, 1152, 1536, 2304, 3072, 4608, 5120)
# Rows, weight, modulation, output and gradients; mixed as under autocast.
TYPES = {
    "bf16": dict.fromkeys(("rows", "weight", "m", "out"), "bf16"),
    "fp16": dict.fromkeys(("rows", "weight", "m", "out"), "fp16"),
    "fp32": dict.fromkeys(("rows", "weight", "m", "out"), "fp32"),
    "mixed": {"rows": "bf16", "weight": "fp32", "m": "bf16", "out": "fp32"},
}
KINDS = {
    "modulate": {"GATED": False, "CENTRED": False, "WEIGHTED": True},
    "centred": {"GATED": False, "CENTRED": True, "WEIGHTED": False},
    "gate": {"GATED": True, "CENTRED": False, "WEIGHTED": True},
}
CASES = [
    (direction, kind, capability, types, width, per_token)
    for direction in ("forward", "backward")
    for kind, capability, types, width, per_token in [
        *(("gate", c, "bf16", w, False) for c in (80, 90, 100) for w in WIDTHS),
        *(("modulate", c, "bf16", 2304, False) for c in (80, 100)),
        *(("modulate", 90, "bf16", w, False) for w in WIDTHS),
        *((k, 90, "bf16", 2304, True) for k in KINDS),
        *(("gate", c, "fp32", 1536, p) for c in (80, 90) for p in (False, True)),
        *(("gate", 90, "bf16", w, True) for w in (96, 8192)),
        *(("gate", 90, "fp16", 1536, False), ("gate", 90, "mixed", 2304, True)),
        ("centred", 90, "bf16", 2304, False),
        ("gate", 80, "fp32", 8192, False),
    ]
]
# Of one thread; a block of 16 warps, as the widest rows take, could not start with more than 128.
REGISTERS = {"forward": 80, "backward": 128}


def request_for(direction, kind, capability, types, width, per_token):
    name = {"forward": "sandwich_kernel", "backward": "sandwich_backward_kernel"}[direction]
    names = signature(getattr(sandwich, name).fn).parameters
    block_t, block_w = sandwich._tile(width)
    spelled = TYPES[types]
    pointers = {
        **dict.fromkeys(("residual_ptr", "x_ptr", "grad_x_ptr"), spelled["rows"]),
        **dict.fromkeys(("out_ptr", "grad_ptr"), spelled["out"]),
        **dict.fromkeys(("m_ptr", "grad_m_ptr"), spelled["m"]),
        **{"weight_ptr": spelled["weight"], "grad_weight_ptr": "fp32", "rstd_ptr": "fp32"},
    }
    if not per_token:
        pointers["grad_m_ptr"] = "fp32"
    constants = KINDS[kind] | {
        **dict.fromkeys(("GRAD_X", "GRAD_M"), True),
        **{"GRAD_WEIGHT": KINDS[kind]["WEIGHTED"], "PER_TOKEN": per_token, "VECTOR": 8},
        **{"W": width, "BLOCK_T": block_t, "BLOCK_W": block_w},
        **{name: 1 for name in names if name.endswith("_sw")},
    }
    return {
        "kernel": f"nextdit_kernels.sandwich:{name}",
        "capability": capability,
        "types": dict.fromkeys(names, "i32")
        | {"eps": "fp32"}
        | {name: f"*{pointers[name]}" for name in names if name.endswith("_ptr")},
        "constants": {name: constants[name] for name in names if name in constants},
        "options": sandwich._options(getattr(sandwich, name), block_t, block_w),
    }


@pytest.fixture(scope="module")
def built(compile_ahead):
    """The code of every case."""
    return dict(zip(CASES, compile_ahead([request_for(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-{}-sm{}-{}-{}-{}".format(*case))
def test_wide_loads_and_no_local_memory(built, case) -> None:
    code = built[case]
    ptx, sass = code["ptx"], code["sass"]
    assert ".local" not in ptx
    assert code["stack"] == 0
    assert not re.findall(r"\b(?:LDL|STL)\b", sass)
    assert code["registers"] <= REGISTERS[case[0]]
    # Besides rows, each token has one number: 1 / rms.
    one = {"forward": "st.global.b32", "backward": "ld.global.b32"}[case[0]]
    found = re.findall(r"\b(?:ld|st)\.global\S*", ptx)
    assert set(found) == {"ld.global.v4.b32", "st.global.v4.b32", one}
    assert found.count(one) <= max(1, sandwich._tile(case[4])[0])
