"""Time what the host spends on a call of each operator, with a stand-in for the GPU.

`python benchmarks/kernels/host.py [--write]` needs Triton and no GPU. It calls the operators
eagerly on small tensors, whose size does not matter to the host, with kernels that do nothing: once
in place of Triton's launcher and once behind it. What the driver takes for a launch is missing in
both, and memory comes from the CPU's allocator. Beside them stands how long it takes to allocate
the outputs alone, which any function that launches a kernel has to do. Times are those of the
thread, so that other work on the machine is not counted; medians of interleaved batches.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from contest import markdown
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nextdit_kernels import (
    attention,
    gate_residual,
    gated_cross_attention,
    norm_modulate,
    norm_rotate,
    rotate,
    swiglu,
)

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "rotary": ("rotate_qk_kernel",),
    "glu": ("swiglu_kernel",),
    "qk_norm": ("norm_rotate_kernel",),
    "sandwich": ("sandwich_kernel",),
    "softmax_attention": ("attention_kernel",),
}


class StandIn:
    """Takes a kernel's place: accepts tensors of the CPU, and goes as far as it is told."""

    through_triton = False

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.kernel[grid] if StandIn.through_triton else _nothing


def _nothing(*arguments: Any, **options: Any) -> None:
    pass


def _compiled(kernel: JITFunction, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
    """Give Triton a compiled kernel that does nothing, as if it had compiled one."""
    made = SimpleNamespace(
        launch_metadata=_nothing, run=_nothing, function=None, packed_metadata=None
    )
    kernel.device_caches[device][0][key] = made
    return made


def stand_in() -> None:
    """Put stand-ins in the place of the driver, the compiler and all kernels."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    JITFunction._do_compile = _compiled
    for name, kernels in KERNELS.items():
        module = import_module(f"nextdit_kernels.{name}")
        for kernel in kernels:
            setattr(module, kernel, StandIn(getattr(module, kernel)))


def calls() -> dict[str, tuple[Callable[[], Any], list[torch.Tensor], Callable[[], Any]]]:
    """Give calls of each operator as Next-DiT makes them, and of what allocates its outputs.

    Between them stand the tensors that a gradient would be asked of.
    """
    q, k, v, y = (torch.randn(2, 4, n, 72, dtype=torch.float16) for n in (32, 8, 8, 32))
    cos, sin = torch.ones(4, 36), torch.zeros(4, 36)
    x, up = (torch.randn(2, 4, 2304, dtype=torch.float16) for _ in range(2))
    rows = torch.randn(2, 2304, dtype=torch.float16)
    weights = {
        f"{name}_{part}": torch.ones(n * 72, dtype=torch.float16)
        for name, n in (("q", 32), ("k", 8))
        for part in ("weight", "bias")
    }
    weight, gate = torch.ones(2304, dtype=torch.float16), torch.zeros(32)

    def like(*tensors: torch.Tensor, numbers: int = 0) -> Callable[[], Any]:
        def allocate() -> None:
            for tensor in tensors:
                torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for _ in range(numbers):
                tensors[0].new_empty((2, 4), dtype=torch.float32)

        return allocate

    return {
        "rotate": (lambda: rotate(q, k, cos, sin), [q, k], like(q, k)),
        "norm_rotate": (
            lambda: norm_rotate(q, k, cos, sin, **weights),
            [q, k],
            like(q, k, numbers=1),
        ),
        "swiglu": (lambda: swiglu(x, up), [x, up], like(x)),
        "norm_modulate": (
            lambda: norm_modulate(x, weight, rows, eps=1e-5),
            [x, rows],
            like(x, numbers=1),
        ),
        "gate_residual": (
            lambda: gate_residual(x, up, weight, rows, eps=1e-5),
            [x, up],
            like(x, numbers=1),
        ),
        "attention": (lambda: attention(q, k, v), [q, k, v], like(q, numbers=1)),
        "gated_cross_attention": (
            lambda: gated_cross_attention(q, k, v, gate, y),
            [q, k, v],
            like(q, numbers=2),
        ),
    }


def timed(run: Callable[[], Any], count: int = 200) -> float:
    """Give the microseconds of a call, mean of a batch."""
    begin = time.thread_time()
    for _ in range(count):
        run()
    return (time.thread_time() - begin) / count * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--write", action="store_true", help="also to benchmarks/results/")
    options = parser.parse_args()
    rounds = options.rounds
    stand_in()
    ways = [(triton, recorded) for triton in (False, True) for recorded in (False, True)]
    times: dict[Any, list[float]] = {}
    operators = calls()
    for _ in range(rounds + 1):
        for name, (run, leaves, allocate) in operators.items():
            times.setdefault(name, []).append(timed(allocate))
            for way in ways:
                StandIn.through_triton, recorded = way
                for leaf in leaves:
                    leaf.requires_grad_(recorded)
                times.setdefault((name, way), []).append(timed(run))
                for leaf in leaves:
                    leaf.requires_grad_(False)
    head = ("to launch", "recorded", "with Triton's launcher", "with it, recorded")
    rows = [("µs of the host", "outputs alone", *head)]
    for name in operators:
        keys = [name, *((name, way) for way in ways)]
        rows.append((name, *(f"{statistics.median(times[key][1:]):.1f}" for key in keys)))
    report = f"{conditions(rounds)}\n\n{markdown(rows)}"
    print(report)
    if options.write:
        file = ROOT / "benchmarks" / "results" / f"host-kernels--{datetime.now(UTC):%Y-%m-%d}.md"
        file.write_text(report + "\n", encoding="utf-8")
        print(f"written to {file}")
    return 0


def conditions(rounds: int) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    return "\n".join(
        [
            "# What the host spends on a call of a kernel",
            "",
            "Kernels do nothing and there is no GPU: up to the launch, and with Triton's launcher "
            "but not the driver; recorded is with autograd. Medians of "
            f"{rounds} interleaved rounds on a shared machine.",
            "",
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            f"- commit: {commit or 'unknown'}",
            f"- versions: Python {platform.python_version()}, torch {torch.__version__}, "
            f"triton {triton.__version__}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
