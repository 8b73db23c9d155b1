"""Gradient checkpointing on the CPU: `python benchmarks/core/checkpoint_memory.py [--write]`.

What a training step (forward and backward) takes beside weights and gradients, with and without
`checkpoint_activations`: the tensors that autograd keeps, what the process takes at most by the
kernel's own account, each in a process of its own; and the time of a step, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import summary
import torch
from models import grid

from nextdit_core import Conditioning, NextDiT, NextDiTConfig, Tokens
from nextdit_core.training.activations import checkpoint_blocks

#: Name of the sizes, and rows and columns of the one sample.
CASES = (("86m", 32, 32), ("600m", 16, 32))
TEXT_DIM, TEXT_TOKENS, TOKEN_DIM = 2048, 128, 16
MIB = 2**20

Batch = tuple[Tokens, torch.Tensor, Conditioning]


def main() -> int:
    parser = summary.options("Memory and time of gradient checkpointing on the CPU.", rounds=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="file of measurements, which are not made again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(memory(*json.loads(options.measure))))
        return 0
    kept = {}
    if options.keep and options.keep.is_file():
        kept = json.loads(options.keep.read_text())
    rows = [
        (
            *("size", "parameters", "tokens", "weights and gradients, MiB"),
            *("kept by autograd, MiB", "peak above these, MiB", "step, s", "time over without"),
        )
    ]
    for name, height, width in CASES:
        case = f"{name} {height}x{width}"
        if case not in kept:
            rounds = options.rounds if name == "86m" else few_rounds(options.rounds)
            kept[case] = [
                *(measured(name, height, width, checkpointed=one) for one in (False, True)),
                times(name, height, width, rounds),
            ]
            if options.keep:
                options.keep.write_text(json.dumps(kept))
        plain, less, seconds = kept[case]
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        rows.append(
            (
                *(name, f"{plain['parameters']:,}", str(height * width)),
                f"{2 * plain['weights'] / MIB:,.0f}",
                f"{plain['kept'] / MIB:,.0f} → {less['kept'] / MIB:,.0f} "
                f"(1/{plain['kept'] / less['kept']:.1f})",
                f"{plain['peak'] / MIB:,.0f} → {less['peak'] / MIB:,.0f} "
                f"(1/{plain['peak'] / less['peak']:.1f})",
                " → ".join(f"{statistics.median(one):.2f}" for one in seconds),
                f"{ratio:.2f}",
            )
        )
    text = (
        f"One sample, float32, text of width {TEXT_DIM} and {TEXT_TOKENS} tokens; each cell "
        "without → with checkpointing. Kept: storages that autograd saves for the backward pass, "
        "those of parameters left out. Peak: the largest resident size of the process during one "
        "forward and backward pass (VmHWM, reset before it), less the size before it, when "
        "weights, gradients and inputs were there; in a fresh process each. Time: CPU "
        "time of one thread, "
        f"medians of interleaved rounds ({options.rounds}, for 600m "
        f"{few_rounds(options.rounds)}), and the median of their ratios."
    )
    parts = ["# Gradient checkpointing on the CPU", summary.head(), text, summary.table(rows)]
    return summary.finish(parts, "checkpoint-memory-cpu", write=options.write)


def few_rounds(rounds: int) -> int:
    """Say how often the large model runs."""
    return max(1, rounds // 2)


def build(
    name: str, height: int, width: int
) -> tuple[NextDiT, tuple[Tokens, torch.Tensor, Conditioning]]:
    """Make a backbone with random weights, none of them zero, and a batch of one sample."""
    random = torch.Generator().manual_seed(0)
    config = NextDiTConfig.named(name, token_dim=TOKEN_DIM, text_dim=TEXT_DIM)
    model = NextDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.02)
    count = height * width
    tokens = Tokens(torch.randn(count, TOKEN_DIM, generator=random), grid(height, width), (count,))
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=random)
    return model, (tokens, torch.tensor([0.3]), Conditioning(text, torch.tensor([TEXT_TOKENS])))


def step(model: NextDiT, batch: Batch) -> None:
    """Go forward and backward; gradients add up, so that none is allocated anew."""
    model(*batch).square().mean().backward()


def measured(name: str, height: int, width: int, *, checkpointed: bool) -> dict[str, int]:
    """Measure in a fresh process."""
    case = json.dumps([name, height, width, checkpointed])
    command = [sys.executable, __file__, "--measure", case]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def memory(name: str, height: int, width: int, checkpointed: bool) -> dict[str, int]:
    """Measure one step in this process, which has done nothing else."""
    model, batch = build(name, height, width)
    if checkpointed:
        checkpoint_blocks(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(0.0)  # written, so resident
    _, (few, t, text) = build("tiny", 4, 4)
    step(model, (few, t, text))  # threads and kernels are there
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(model, batch)
    peak = _status("VmHWM")
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*batch).square().mean()
    total = sum(kept.values())
    del out
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "kept": total,
        "peak": peak - before,
    }


def _status(key: str) -> int:
    """Read a size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def times(name: str, height: int, width: int, rounds: int) -> tuple[list[float], list[float]]:
    """Time steps without and with checkpointing, in turns, on one set of weights."""
    model, batch = build(name, height, width)
    found: tuple[list[float], list[float]] = ([], [])
    step(model, batch)  # warms up, and allocates the gradients
    for _ in range(rounds):
        for checkpointed, seconds in zip((False, True), found, strict=True):
            if checkpointed:
                checkpoint_blocks(model)
            begun = time.thread_time()
            step(model, batch)
            seconds.append(time.thread_time() - begun)
            for block in model.blocks:
                vars(block).pop("forward", None)
    return found


if __name__ == "__main__":
    sys.exit(main())
