"""Rotate q and k on the CPU: rope3d against diffusers' real form and Lumina's complex form.

    OMP_NUM_THREADS=1 python benchmarks/apply_cpu.py --runs 15

Forms run in turn, so that a busy machine slows all of them alike; times are medians. Memory is
the peak of what PyTorch's allocator hands out during one call, results included. Tables of cosine
and sine are made beforehand in every form.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

import rope3d

Pair = tuple[Tensor, Tensor]


def real_form(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as `apply_rotary_emb(use_real=True)` of diffusers 0.42.1; tables `[tokens, dim]`."""
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    x_real, x_imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    x_rotated = torch.stack([-x_imag, x_real], dim=-1).flatten(3)
    return (x.float() * cos + x_rotated.float() * sin).to(x.dtype)


def complex_form(x: Tensor, table: Tensor) -> Tensor:
    """Rotate as `Attention.apply_rotary_emb` of Lumina-T2X; table `[1, tokens, pairs]`."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table.unsqueeze(2)).flatten(3).type_as(x)


def peak_memory(function: Callable[[], Pair]) -> int:
    """Measure bytes above those held before the call, from the allocator's own record."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def main() -> None:
    """Print one table per dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64, help="tokens per side of the image")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=72)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    rope = rope3d.lumina(arguments.head_dim)
    rotation = rope.rotation(rope3d.grid(height=arguments.side, width=arguments.side))
    cos, sin = rotation.cos.repeat_interleave(2, -1), rotation.sin.repeat_interleave(2, -1)
    table = torch.complex(rotation.cos, rotation.sin)[None]
    shape = (1, arguments.side**2, arguments.heads, arguments.head_dim)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, q and k {list(shape)}")
    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        forms: dict[str, Callable[[], Pair]] = {
            "rope3d.rotate": lambda q=q, k=k: rope3d.rotate(q, k, rotation),
            "diffusers, real": lambda q=q, k=k: (real_form(q, cos, sin), real_form(k, cos, sin)),
            "Lumina, complex": lambda q=q, k=k: (complex_form(q, table), complex_form(k, table)),
            # The last one, as it changes q and k.
            "rope3d, in place": lambda q=q, k=k: rope3d.rotate(q, k, rotation, inplace=True),
        }
        expected = forms["rope3d.rotate"]()[0]
        far = {name: (form()[0] - expected).abs().max().item() for name, form in forms.items()}
        del expected
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(arguments.runs):
            for name, form in forms.items():
                # Whoever runs after one that used much memory finds it mapped already, and is up to
                # 1.7 times as fast: so each runs after itself.
                form()
                start = time.perf_counter()
                form()
                times[name].append(time.perf_counter() - start)
        memory = {name: peak_memory(form) for name, form in forms.items()}
        median = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{'form':<18}{dtype!s:>16}  {'time':>6}{'peak MB':>10}{'memory':>8}{'apart':>10}")
        for name in forms:
            print(
                f"{name:<18}{median[name] * 1e3:>13.1f} ms"
                f"{median[name] / median['rope3d.rotate']:>7.2f}x"
                f"{memory[name] / 2**20:>10.1f}"
                f"{memory[name] / max(1, memory['rope3d.rotate']):>7.2f}x{far[name]:>10.1e}"
            )


if __name__ == "__main__":
    main()
