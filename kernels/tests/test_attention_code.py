"""The machine code of attention, compiled ahead of time."""

import re
from collections import Counter
from inspect import signature

import pytest

from nextdit_kernels import attention_backward, attention_forward
from nextdit_kernels.attention_tiles import split_head

KERNELS = {
    "forward": (attention_forward, "attention_kernel"),
    "query-gradient": (attention_backward, "query_gradient_kernel"),
    "key-gradient": (attention_backward, "key_gradient_kernel"),
}
PARTS = {  # the pointers that are not None
    "dense": (),
    "packed": ("cu_ptr", "cu_keys_ptr", "scales_ptr"),
    "gated": ("mask_ptr", "gate_ptr", "residual_ptr", "gated_ptr"),
}
OPTIONAL = {name for names in PARTS.values() for name in names}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of 8.x, that of its consumer cards
CASES = [
    (kernel, capability, *case)
    for kernel in KERNELS
    for capability in SHARED
    for case in [
        *(("bf16", width, "dense") for width in (64, 72, 80, 96, 128)),
        *(("bf16", 72, parts) for parts in ("packed", "gated")),
        *(("fp16", 72, parts) for parts in ("dense", "gated")),
        *(("fp32", width, "dense") for width in (64, 72, 96, 128)),
        *(("fp32", 72, parts) for parts in ("packed", "gated")),
    ]
]
UNALIGNED = ("forward", 90, "bf16", 72, "dense", 1)


def sizes_of(kernel, capability, dtype, width, parts):
    case = (width, 4 if dtype == "fp32" else 2, divmod(capability, 10), "mask_ptr" in PARTS[parts])
    if kernel == "forward":
        return attention_forward.blocks(*case)
    if kernel == "query-gradient":
        return attention_backward.query_blocks(*case)
    return attention_backward.key_blocks(*case)


def request_for(kernel, capability, dtype, width, parts, vector=None):
    module, name = KERNELS[kernel]
    names = signature(getattr(module, name).fn).parameters
    types = dict.fromkeys(names, "i32") | {"scale": "fp32"}
    types |= {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "scales_ptr"), "*fp32")
    types |= {"cu_ptr": "*i32", "cu_keys_ptr": "*i32", "mask_ptr": "*u8"}
    sizes = sizes_of(kernel, capability, dtype, width, parts)
    main, tail = split_head(width)
    constants = {
        "D": width,
        "MAIN": main,
        "TAIL": tail,
        "VECTOR": vector or (4 if dtype == "fp32" else 8),
        "PRECISION": "ieee",
        "BLOCK_M": sizes["BLOCK_M"],
        "BLOCK_N": sizes["BLOCK_N"],
    }
    constants |= {name: 1 for name in names if name.endswith("_sd")}
    constants |= {name: None for name in names if name in OPTIONAL - set(PARTS[parts])}
    return {
        "kernel": f"{module.__name__}:{name}",
        "capability": capability,
        "types": {name: types[name] for name in names},
        "constants": constants,
        "options": {"num_warps": sizes["num_warps"], "num_stages": sizes["num_stages"]},
    }


@pytest.fixture(scope="module")
def built(compile_ahead):
    """The code of every case."""
    cases = [*CASES, UNALIGNED]
    return dict(zip(cases, compile_ahead([request_for(*case) for case in cases]), strict=True))


def products(ptx):
    """Count the instructions that multiply matrices."""
    return Counter(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", ptx))


def work(case, ptx):
    """Add up the sizes of the products that all warps' code names, for each query and key."""
    shapes = re.findall(r"\bw?g?mma\.(?:sync|mma_async)\S*?\.m(\d+)n(\d+)k(\d+)\.", ptx)
    total, sizes = sum(int(m) * int(n) * int(k) for m, n, k in shapes), sizes_of(*case)
    return total * sizes["num_warps"] / (sizes["BLOCK_M"] * sizes["BLOCK_N"])


def named(case):
    return "{}-sm{}-{}-{}-{}".format(*case)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_fits_the_gpu_without_local_memory(built, case) -> None:
    code = built[case]
    assert ".local" not in code["ptx"]
    assert code["stack"] == 0
    assert code["shared"] <= SHARED[case[1]]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_multiplies_on_tensor_cores_of_its_generation(built, case) -> None:
    _, capability, dtype, *_ = case
    unit = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    assert set(products(built[case]["ptx"])) == (set() if dtype == "fp32" else {unit})


@pytest.mark.parametrize("case", CASES, ids=named)
def test_rows_of_channels_go_16_bytes_at_a_time(built, case) -> None:
    kernel, capability, dtype, width, parts = case
    ptx, pointers, sizes = built[case]["ptx"], PARTS[parts], sizes_of(*case)
    widths = Counter(re.findall(r"\b((?:ld|st)\.global\.\S+)", ptx))
    copies = Counter(re.findall(r"\bcp\.async\.c\S+ \[.*?\], \[.*?\], 0x(\w+)", ptx))

    # What a program loads once: q; q, its gradient and out; k and v. Loads of 16 bytes are enough
    # for all of these blocks.
    once, rows = {
        "forward": (2 if "residual_ptr" in pointers else 1, "BLOCK_M"),
        "query-gradient": (3, "BLOCK_M"),
        "key-gradient": (2, "BLOCK_N"),
    }[kernel]
    loaded = once * sizes[rows]
    if sizes["num_stages"] == 1:  # and what is then not copied ahead: q and its gradient
        assert kernel == "key-gradient"
        loaded += 2 * sizes["BLOCK_M"]
    block = loaded * sum(split_head(width)) * (4 if dtype == "fp32" else 2)
    assert widths["ld.global.v4.b32"] * 16 * 32 * sizes["num_warps"] == block
    # What it copies in its loop: k and v; or q and its gradient, with lse and delta, a number for
    # each query, and where there are such the scale.
    if sizes["num_stages"] == 1:
        assert not copies
    elif kernel == "key-gradient":
        assert set(copies) == {"10", "4"}
        stages = 3 if capability == 100 and dtype != "fp32" else 2
        assert copies["4"] == stages * (3 if "scales_ptr" in pointers else 2)
    else:
        assert set(copies) == {"10"}
    # What else is narrow is a number of a row, a head or a sample: lse, delta, a bound, a mask.
    narrow = {"ld.global.b32", "st.global.b32"}
    narrow |= {"ld.global.b16", "ld.global.b8"} if "gate_ptr" in pointers else set()
    assert set(widths) <= {"ld.global.v4.b32", "st.global.v4.b32"} | narrow


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("width", "share"), [(64, 0.5), (72, 0.625), (80, 0.625), (96, 0.75)])
def test_narrow_heads_do_not_pay_for_wide_ones(built, kernel, capability, width, share) -> None:
    cases = [(kernel, capability, "bf16", w, "dense") for w in (width, 128)]
    mine, padded = (work(case, built[case]["ptx"]) for case in cases)
    assert mine == share * padded


def test_without_the_alignment_hint_loads_are_two_bytes(built) -> None:
    assert "ld.global.b16" in built[UNALIGNED]["ptx"]
