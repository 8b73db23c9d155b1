"""Context drop on the CPU: `python benchmarks/core/context_drop.py --run runs/digits [--write]`.

What a forward costs with keys and values pooled, at several token counts; and what pooling early in
sampling does to the samples of a trained model (`nextdit demo` trains one).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import summary
import torch
from models import CHANNELS, PATCH, TEXT_DIM, diffusers_model, grid, our_model

from nextdit_core import Conditioning, ContextDrop, Pipeline, Tokens

FACTORS = (1, 2, 4)
SHAPES = ((32, 32), (32, 64), (64, 64))
SCHEDULES = ("0.1:2", "0.3:2", "0.5:2", "1:2", "0.1:4,0.3:2", "0.3:4,0.5:2")


def main() -> int:
    parser = summary.options("Context drop on the CPU.", rounds=3, run=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = ["# Context drop on the CPU", summary.head(), cost(options.rounds)]
    if options.run is not None:
        parts.append(deviation(options.run))
    return summary.finish(parts, "context-drop-cpu", write=options.write)


@torch.no_grad()
def cost(rounds: int) -> str:
    """Time one forward of a 78M model, with and without pooling, in turns."""
    rows = [("dtype", "tokens", "factor", "ms", "time without over with")]
    for dtype in (torch.float32, torch.bfloat16):
        model = our_model(diffusers_model()).to(dtype)
        for height, width in SHAPES:
            count = height * width
            random = torch.Generator().manual_seed(0)
            values = torch.randn(count, PATCH**2 * CHANNELS, generator=random).to(dtype)
            tokens = Tokens(values, grid(height, width), (count,))
            text = torch.randn(1, 128, TEXT_DIM, generator=random).to(dtype)
            prepared = model.prepare(Conditioning(text, torch.tensor([128])))
            t = torch.tensor([0.1])
            poolings = {
                factor: ContextDrop(((1.0, factor),)).poolings(tokens)[1, factor, factor]
                for factor in FACTORS
            }
            least = dict.fromkeys(FACTORS, float("inf"))
            for _ in range(rounds + 1):  # the first of them warms up
                for factor, pooling in poolings.items():
                    begun = time.thread_time()
                    model(tokens, t, prepared, pooling=pooling)
                    least[factor] = min(least[factor], time.thread_time() - begun)
            rows += [
                (
                    str(dtype).removeprefix("torch."),
                    str(count),
                    f"{factor} x {factor}",
                    f"{seconds * 1e3:.0f}",
                    f"{least[1] / seconds:.2f}",
                )
                for factor, seconds in least.items()
            ]
    return (
        "## Cost\n\nOne forward, batch 1, text prepared; the least CPU time of one thread in "
        f"{rounds} rounds.\n\n" + summary.table(rows)
    )


@torch.no_grad()
def deviation(run: Path) -> str:
    """Compare samples with and without pooling, from the same noise."""
    pipe = Pipeline.from_pretrained(run, device="cpu")
    prompts = pipe.card.example_prompts * 5
    plain = torch.stack(pipe(prompts, output="latent", nfe=30))
    other = torch.stack(pipe(prompts, output="latent", nfe=30, seed=1))
    between = (other - plain).square().mean().sqrt() / plain.std()
    rows = [("schedule", "difference")]
    for schedule in SCHEDULES:
        found = torch.stack(pipe(prompts, output="latent", nfe=30, context_drop=schedule))
        apart = (found - plain).square().mean().sqrt() / plain.std()
        rows.append((f"`{schedule}`", f"{apart:.3f}"))
    rows.append(("none, other noise", f"{between:.3f}"))
    return (
        f"## What it does to samples\n\nRoot mean square difference to sampling without, over the "
        f"standard deviation, {len(prompts)} samples of `{run.name}`, 30 evaluations. Grids have "
        "8 x 8 tokens, so that a cell is a larger part of the picture than at high "
        f"resolution.\n\n{summary.table(rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
