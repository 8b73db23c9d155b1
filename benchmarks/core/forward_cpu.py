"""One forward on the CPU: `python benchmarks/core/forward_cpu.py [--write]`.

Ours and diffusers', with the same weights, against the bare matrix products and attention at the
same shapes. Everything runs in one thread, in turns; the least CPU time of several rounds. Then a
sampling loop with guidance, and how soon each comes within an error of a long solution.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import summary
import torch
from models import (
    CHANNELS,
    HEADS,
    KV_HEADS,
    LAYERS,
    PATCH,
    TEXT_DIM,
    WIDTH,
    diffusers_model,
    grid,
    our_model,
    patchify,
    unpatchify,
)
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from nextdit_core import Conditioning, Tokens

BATCH, SIDE, TEXT = 2, 64, 128


def main() -> int:
    parser = summary.options("One forward on the CPU, ours and diffusers'.", rounds=5)
    parser.add_argument("--compiled", action="store_true", help="both under torch.compile besides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        "# One forward on the CPU",
        summary.head(
            f"- model: width {WIDTH}, {LAYERS} layers, {HEADS} heads, {KV_HEADS} of keys; "
            f"batch {BATCH} of {CHANNELS} x {SIDE} x {SIDE}, {(SIDE // PATCH) ** 2} tokens "
            f"each, text {TEXT} x {TEXT_DIM}, one sample's half masked"
        ),
    ]
    parts += [
        report(dtype, options.rounds, compiled=options.compiled)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return summary.finish(parts, "forward-cpu", write=options.write)


@torch.no_grad()
def report(dtype: torch.dtype, rounds: int, *, compiled: bool) -> str:
    """Time everything in one dtype."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    theirs = diffusers_model()
    ours = our_model(theirs).to(dtype)
    theirs = theirs.to(dtype)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=random).to(dtype)
    t = torch.tensor([0.3, 0.6])
    text = torch.randn(BATCH, TEXT, TEXT_DIM, generator=random).to(dtype)
    condition = Conditioning(text, torch.tensor([TEXT, TEXT // 2]))
    rows = SIDE // PATCH
    tokens = Tokens(patchify(x), grid(rows, rows).repeat(BATCH, 1), (rows * rows,) * BATCH)
    table = get_2d_rotary_pos_embed_lumina(WIDTH // HEADS, 384, 384)
    prepared = ours.prepare(condition)

    def run_theirs(model: Callable[..., tuple[Tensor, ...]] = theirs) -> Tensor:
        return model(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text,
            encoder_mask=condition.mask,
            image_rotary_emb=table,
            cross_attention_kwargs={},
            return_dict=False,
        )[0]

    cases: dict[str, Callable[[], object]] = {
        "matrix products alone": _products(dtype),
        "attention alone": _attention(dtype, condition.mask),
        "ours": lambda: ours(tokens, t, condition),
        "ours, text prepared": lambda: ours(tokens, t, prepared),
        "diffusers": run_theirs,
    }
    if compiled:
        quick = torch.compile(ours)
        cases["ours, compiled"] = lambda: quick(tokens, t, condition)
        other = torch.compile(theirs)
        cases["diffusers, compiled"] = lambda: run_theirs(other)
    apart = unpatchify(ours(tokens, t, condition), x) - run_theirs().chunk(2, 1)[0]
    least = dict.fromkeys(cases, float("inf"))
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            begun = time.thread_time()
            case()
            least[name] = min(least[name], time.thread_time() - begun)
    bare = least["matrix products alone"] + least["attention alone"]
    lines = ["| | ms | over bare | diffusers over it |", "|---|---|---|---|"]
    for name, seconds in {"bare: both": bare, **least}.items():
        lines.append(
            f"| {name} | {seconds * 1e3:.0f} | {seconds / bare:.2f} | "
            f"{least['diffusers'] / seconds:.2f} |"
        )
    name = str(dtype).removeprefix("torch.")
    return (
        f"## {name}\n\n"
        + "\n".join(lines)
        + f"\n\nLargest difference of the two outputs: {apart.abs().max():.1e}."
    )


def _products(dtype: torch.dtype) -> Callable[[], object]:
    """Every matrix product of a forward, once each, on the layers' own shapes."""
    tokens, kv = (SIDE // PATCH) ** 2, WIDTH // HEADS * KV_HEADS
    hidden, rank = 2048, min(WIDTH, 1024)
    shapes = [(BATCH * tokens, PATCH**2 * CHANNELS, WIDTH), (BATCH * tokens, WIDTH, 16)]
    shapes += [
        (BATCH, 256, rank),
        (BATCH, rank, rank),
        (BATCH, TEXT_DIM, rank),
        (BATCH, rank, WIDTH),
    ]
    for _ in range(LAYERS):
        shapes += [(BATCH * tokens, WIDTH, width) for width in (WIDTH, kv, kv, WIDTH)]
        shapes += [(BATCH * TEXT, TEXT_DIM, kv)] * 2 + [(BATCH, rank, 4 * WIDTH)]
        shapes += [(BATCH * tokens, WIDTH, hidden)] * 2 + [(BATCH * tokens, hidden, WIDTH)]
    inputs = {s: torch.randn(s[0], s[1]).to(dtype) for s in set(shapes)}
    weights = [torch.randn(s[2], s[1]).to(dtype) for s in shapes]
    return lambda: [linear(inputs[s], w) for s, w in zip(shapes, weights, strict=True)]


def _attention(dtype: torch.dtype, mask: Tensor) -> Callable[[], object]:
    """Self and text attention of every layer, without and with a mask."""
    tokens, dim = (SIDE // PATCH) ** 2, WIDTH // HEADS
    q = torch.randn(BATCH, HEADS, tokens, dim).to(dtype)
    k, v = (torch.randn(BATCH, KV_HEADS, tokens, dim).to(dtype) for _ in range(2))
    y, z = (torch.randn(BATCH, KV_HEADS, TEXT, dim).to(dtype) for _ in range(2))
    seen = mask[:, None, None]

    def run() -> None:
        for _ in range(LAYERS):
            scaled_dot_product_attention(q, k, v, enable_gqa=True)
            scaled_dot_product_attention(q, y, z, attn_mask=seen, enable_gqa=True)

    return run


if __name__ == "__main__":
    sys.exit(main())
