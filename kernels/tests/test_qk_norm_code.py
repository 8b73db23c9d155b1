"""The machine code of QK-norm with rotation, compiled ahead of time."""

import re
from inspect import signature

import pytest
import torch

from nextdit_kernels import qk_norm

CASES = {  # heads of q and of k, channels of a head, norm, over, dtype
    "lumina-next": (32, 8, 72, "layer", "hidden", torch.bfloat16),
    "lumina-next-fp32": (32, 8, 72, "layer", "hidden", torch.float32),
    "lumina-next-rms": (32, 8, 72, "rms", "hidden", torch.float16),
    "hidden-576": (8, 8, 72, "layer", "hidden", torch.bfloat16),
    "hidden-1152": (16, 16, 72, "layer", "hidden", torch.bfloat16),
    "hidden-1152-fp16": (16, 16, 72, "layer", "hidden", torch.float16),
    "hidden-1536": (24, 24, 64, "layer", "hidden", torch.bfloat16),
    "hidden-3072": (24, 24, 128, "layer", "hidden", torch.bfloat16),
    "hidden-4608": (64, 16, 72, "layer", "hidden", torch.bfloat16),
    "hidden-5120": (40, 40, 128, "layer", "hidden", torch.bfloat16),
    "wan": (40, 40, 128, "rms", "hidden", torch.bfloat16),
    "flux": (24, 24, 128, "rms", "head", torch.bfloat16),
    "lumina-2": (24, 8, 96, "rms", "head", torch.bfloat16),
    "heads-of-64": (16, 16, 64, "layer", "head", torch.bfloat16),
    "heads-of-72": (32, 8, 72, "layer", "head", torch.float16),
}
SPREAD = {name for name in CASES if name.startswith("hidden-")} | {"lumina-next", "wan"}
CASES |= {f"{name}-spread": CASES[name] for name in sorted(SPREAD)}  # heads are not neighbours
REGISTERS = {  # of a thread at most: forward, backward
    "lumina-next": (128, 168),
    "lumina-next-fp32": (208, 248),
    "lumina-next-rms": (128, 168),
    "hidden-576": (128, 168),
    "hidden-1152": (128, 168),
    "hidden-1152-fp16": (128, 168),
    "hidden-1536": (128, 168),
    "hidden-3072": (128, 255),
    "hidden-4608": (128, 255),
    "hidden-5120": (128, 255),
    "wan": (128, 255),
    "flux": (64, 128),
    "lumina-2": (64, 128),
    "heads-of-64": (80, 128),
    "heads-of-72": (80, 128),
}
REGISTERS |= {f"{name}-spread": (128, 255) for name in SPREAD}
KERNELS = {"forward": "norm_rotate_kernel", "backward": "norm_rotate_backward_kernel"}
CAPABILITIES = (80, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
COMPILED = [(n, d, c) for n in CASES for d in KERNELS for c in CAPABILITIES]


def request_for(name, direction, capability):
    heads, kv_heads, width, norm, over, dtype = CASES[name]
    kernel = KERNELS[direction]
    names = signature(getattr(qk_norm, kernel).fn).parameters
    spread = name.endswith("-spread")
    q, k = (
        torch.empty(1, count, 4096, width, dtype=dtype, device="meta").transpose(1, 2)
        if spread
        else torch.empty(1, 4096, count, width, dtype=dtype, device="meta")
        for count in (heads, kv_heads)
    )
    direction = list(KERNELS).index(direction)
    *_, constants = qk_norm._share(q, k, norm, over, direction, spread=spread)
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg")}
    tables = ((width // 2, 1),)
    constants |= qk_norm._hints((q.stride(), k.stride()), tables, width, q.itemsize)
    constants |= {n: 1 for n in names if n[-3:] in ("_sd", "_sp")}
    constants |= {n: None for n in names if norm == "rms" and "_bias" in n}
    constants |= {n: None for n in names if over == "hidden" and not spread and n.endswith("_sh")}
    if not constants["Q_REST"] + constants["K_REST"] and "means_ptr" in names:
        constants["means_ptr"] = None
    types = dict.fromkeys(names, "i32") | {"eps": "fp32"}
    types |= {n: TYPES[dtype] for n in names if n.endswith("_ptr")}
    types |= {n: "*fp32" for n in names if re.search(r"(stats|means|sums|cos|sin)_ptr$", n)}
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


def widths(ptx, direction, constants):
    """Give the bytes of a thread's global loads and stores by the tensor that they touch.

    An address is followed back through all registers that it is computed from, to the pointer among
    the kernel's arguments.
    """
    arguments = signature(getattr(qk_norm, KERNELS[direction]).fn).parameters
    names = [n for n in arguments if n not in constants]
    sources, accesses = {}, []
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@!?%p\d+ )?([a-z]\w*)((?:\.\w+)*)\s+(.*);", line)
        if found is None:
            continue
        operation, kind, operands = found.groups()
        if operation in ("ld", "st") and kind.startswith(".global"):
            address = re.search(r"\[\s*(%\w+)", operands)[1]
            count = re.search(r"\.v(\d)", kind)
            bits = int(re.search(r"(\d+)$", kind)[1]) * (int(count[1]) if count else 1)
            accesses.append((operation, address, bits // 8))
        else:
            target, *others = re.findall(r"%\w+|_param_\d+", operands) or [None]
            sources.setdefault(target, set()).update(others)

    def pointers(register, seen):
        if register.startswith("_param_"):
            number = int(register.removeprefix("_param_"))
            return {names[number]} if names[number].endswith("_ptr") else set()
        seen.add(register)
        return set().union(
            *(pointers(each, seen) for each in sources.get(register, ()) if each not in seen)
        )

    found = {"ld": {}, "st": {}}
    for operation, register, size in accesses:
        tensors = pointers(register, set())  # two where the code for q and k ends in common
        assert tensors
        for name in tensors:
            found[operation].setdefault(name.removesuffix("_ptr"), set()).add(size)
    return found


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
def test_tensors_go_16_bytes_at_a_time(built, name, direction, capability) -> None:
    *_, over, _ = CASES[name]
    constants = request_for(name, direction, capability)["constants"]
    found = widths(built[name, direction, capability]["ptx"], direction, constants)
    tensors = {"q", "k", "cos", "sin"} | ({"dq", "dk"} if direction == "backward" else set())
    assert all(found["ld"].pop(tensor) == {16} for tensor in tensors)
    assert all(found["st"].pop(tensor) == {16} for tensor in ("q_out", "k_out"))
    # Weights too, but for the forward pass over heads, which loads them once for all groups.
    for parameter in [n for n in found["ld"] if n.endswith(("weight", "bias"))]:
        loads = found["ld"].pop(parameter)
        assert loads == {16} or (over == "head" and direction == "forward")
    # What is left is a number or two of each group; the sums of a program are stored once.
    for operation in found.values():
        assert all(size <= {4} for n, size in operation.items() if n.endswith(("stats", "means")))
    assert set(found["ld"]) <= {"stats", "means"}
    rest = constants["Q_REST"] + constants["K_REST"]
    assert ("stats" in found["ld"]) == (direction == "backward" or rest > 0)
