"""Sampling on the CPU: `python benchmarks/core/sampling_cpu.py --run runs/digits [--write]`.

First the loop: diffusers' `LuminaPipeline` and ours with the same weights, 30 evaluations with
guidance, CPU time of one thread. Then the solver: the error of several solvers on a trained model
(`nextdit demo` trains one), against a long solution, and how many evaluations reach the error that
Euler's method on even steps has at 30. The product is how much sooner the same picture is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import summary
import torch
from models import CHANNELS, PATCH, TEXT_DIM, diffusers_model, grid, our_model, patchify, unpatchify
from torch import Tensor

import flowsolvers as fs
from nextdit_core import Conditioning, Pipeline, Tokens

TEXT, SCALE, STEPS = 128, 4.0, 30
BUDGETS = (4, 5, 6, 7, 8, 10, 12, 16, 20, 30)
SOLVERS = ("auto", "euler", "midpoint", "unipc2", "dpm2m")


def main() -> int:
    parser = summary.options("Sampling on the CPU, ours and diffusers'.", rounds=2, run=True)
    parser.add_argument("--side", type=int, default=64, help="of the latent in the loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = ["# Sampling on the CPU", summary.head(), loops(options.side, options.rounds)]
    if options.run is not None:
        parts.append(solvers(options.run))
    return summary.finish(parts, "sampling-cpu", write=options.write)


@torch.no_grad()
def loops(side: int, rounds: int) -> str:
    """Time both loops."""
    rows = [("", "ours, s", "diffusers, s", "diffusers over ours", "largest difference")]
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = _loops(side, dtype)
        found, expected = ours(), theirs()
        least = [float("inf"), float("inf")]
        for _ in range(rounds):
            for i, run in enumerate((ours, theirs)):
                begun = time.thread_time()
                run()
                least[i] = min(least[i], time.thread_time() - begun)
        rows.append(
            (
                str(dtype).removeprefix("torch."),
                f"{least[0]:.1f}",
                f"{least[1]:.1f}",
                f"{least[1] / least[0]:.2f}",
                f"{(found - expected).abs().max():.1e} of {expected.abs().max():.1f}",
            )
        )
    return (
        f"## The loop\n\n{STEPS} evaluations by Euler's method at guidance {SCALE:g}, latent "
        f"{CHANNELS} x {side} x {side}, text {TEXT} x {TEXT_DIM}.\n\n" + summary.table(rows)
    )


def _loops(side: int, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Make both, on the same weights, noise and text."""
    import diffusers

    network = diffusers_model()
    ours = our_model(network).to(dtype)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
    )
    pipe = diffusers.LuminaPipeline(
        transformer=network.to(dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.to(dtype),
        text_encoder=None,
        tokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, side, side, generator=random).to(dtype)
    text = torch.randn(2, TEXT, TEXT_DIM, generator=random).to(dtype)
    lengths = torch.tensor([TEXT, 8])
    mask = Conditioning(text, lengths).mask.long()
    count = (side // PATCH) ** 2
    both = Tokens(
        noise.new_zeros(2 * count, PATCH**2 * CHANNELS),
        grid(side // PATCH, side // PATCH).repeat(2, 1),
        (count, count),
    )

    def run_ours() -> Tensor:
        prepared = ours.prepare(Conditioning(text, lengths))

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            values = patchify(x.expand(2, -1, -1, -1))
            out = ours(both.with_values(values), t.float().expand(2), prepared)
            cond, uncond = unpatchify(out, x.expand(2, -1, -1, -1)).chunk(2)
            led = uncond[:, :3] + SCALE * (cond - uncond)[:, :3]
            return torch.cat([led, cond[:, 3:]], 1)

        return fs.solve(velocity, noise, nfe=STEPS, solver="euler", schedule=fs.uniform()).x

    def run_theirs() -> Tensor:
        return pipe(
            prompt=None,
            prompt_embeds=text[:1],
            prompt_attention_mask=mask[:1],
            negative_prompt_embeds=text[1:],
            negative_prompt_attention_mask=mask[1:],
            latents=noise,
            height=512,  # what the model is for, so that positions are not rescaled
            width=512,
            guidance_scale=SCALE,
            num_inference_steps=STEPS,
            sigmas=[1.0 - i / STEPS for i in range(STEPS)],
            scaling_watershed=0.0,
            proportional_attn=False,
            output_type="latent",
        ).images

    return run_ours, run_theirs


@torch.no_grad()
def solvers(run: Path) -> str:
    """Give the error of solvers on a trained model, and the evaluations for one error."""
    pipe = Pipeline.from_pretrained(run, device="cpu")
    prompts = pipe.card.example_prompts * 3
    count = len(prompts)
    parts = [
        "## The solver\n\nRoot mean square error over the standard deviation of the samples, of "
        f"{count} samples of `{run.name}`, against 240 evaluations of RK4. Even steps, `auto` on "
        "its own."
    ]
    for scale in (1.0, 2.0, 4.0):

        def sample(solver: str, nfe: int, scale: float = scale) -> Tensor:
            grid = "auto" if solver == "auto" else "uniform"
            request: dict[str, Any] = {"nfe": nfe, "solver": solver, "schedule": grid}
            return torch.stack(pipe(prompts, seed=7, guidance=scale, output="latent", **request))

        answer = sample("rk4", 240)
        rows = [("solver", *map(str, BUDGETS))]
        found = {
            solver: [_error(sample(solver, nfe), answer) for nfe in BUDGETS] for solver in SOLVERS
        }
        rows += [(s, *(f"{e:.4f}" for e in errors)) for s, errors in found.items()]
        aim = found["euler"][-1]
        enough = next(n for n, e in zip(BUDGETS, found["auto"], strict=True) if e <= aim)
        parts.append(
            f"Guidance {scale:g}:\n\n{summary.table(rows)}\n\n`auto` has the error of "
            f"{BUDGETS[-1]} evaluations of Euler's method at {enough}, "
            f"{BUDGETS[-1] / enough:.1f} times fewer."
        )
    return "\n\n".join(parts)


def _error(found: Tensor, answer: Tensor) -> float:
    return ((found - answer).square().mean().sqrt() / answer.std()).item()


if __name__ == "__main__":
    sys.exit(main())
