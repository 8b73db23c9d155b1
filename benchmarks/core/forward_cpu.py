"""One forward on the CPU: `python benchmarks/core/forward_cpu.py [--compiled] [--write]`.

Ours and diffusers', with the same weights, against the bare matrix products and attention at the
same shapes; with `--compiled` both under torch.compile besides. Everything runs in one thread, in
turns; the median CPU time of several rounds, and the spread.
"""

from __future__ import annotations

import copy
import statistics
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
            f"each, text {TEXT} x {TEXT_DIM}, one sample's half masked",
            f"- CPU time of one thread, median of {options.rounds} rounds in which each runs once; "
            f"spread: half of what lies between the 20th and the 80th percentile",
            summary.load(),
        ),
    ]
    parts += [
        report(dtype, options.rounds, compiled=options.compiled)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    parts.append(summary.load("at the end"))
    name = "forward-cpu-compiled" if options.compiled else "forward-cpu"
    return summary.finish(parts, name, write=options.write)


@torch.no_grad()
def report(dtype: torch.dtype, rounds: int, *, compiled: bool) -> str:
    """Time everything in one dtype."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    theirs = diffusers_model().to(dtype).float()  # weights that both dtypes can hold
    wide = our_model(theirs)
    ours = copy.deepcopy(wide).to(dtype)
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
    found, other = unpatchify(ours(tokens, t, condition), x), run_theirs().chunk(2, 1)[0]
    outputs = {"ours and diffusers": found - other}
    notes = ""
    if dtype != torch.float32:
        far = Conditioning(text.float(), condition.lengths)
        exact = unpatchify(wide(tokens.with_values(tokens.values.float()), t, far), x)
        size = exact.square().mean().sqrt()
        errors = [100 * (y - exact).square().mean().sqrt() / size for y in (found, other)]
        notes = (
            "\n\nAgainst float32 with the same weights, root mean square: ours "
            f"{errors[0]:.2f} %, diffusers {errors[1]:.2f} %."
        )
    if compiled:
        blocks = copy.deepcopy(ours)
        for block in blocks.blocks:
            block.compile(fullgraph=True, dynamic=True)
        other = torch.compile(theirs)
        others: dict[str, Callable[[], Tensor]] = {
            "ours, each block compiled": lambda: blocks(tokens, t, condition),
            "diffusers, compiled": lambda: run_theirs(other),
        }
        begins = ""
        for name, case in others.items():
            eager = cases["diffusers" if "diffusers" in name else "ours"]()
            assert isinstance(eager, Tensor)
            begun = time.perf_counter()
            outputs[f"{name} and eager"] = case() - eager
            begins += f" {name}: {time.perf_counter() - begun:.0f} s;"
        notes += f"\n\nThe first call, with what compilation a cache left to do:{begins[:-1]}."
        cases |= others
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            begun = time.thread_time()
            case()
            times[name].append(time.thread_time() - begun)
    median = {name: statistics.median(values) for name, values in times.items()}
    bare = median["matrix products alone"] + median["attention alone"]
    rows = [("", "ms", "spread", "over bare", "diffusers over it")]
    if compiled:
        rows[0] = (*rows[0], "compiled diffusers over it")
    for name, seconds in {"bare: both": bare, **median}.items():
        values = sorted(times.get(name, [seconds] * 2))
        edge = len(values) // 5
        spread = (values[-1 - edge] - values[edge]) / 2
        said = f"{spread * 1e3:.0f}" if name in times else ""
        ratios = (seconds / bare, median["diffusers"] / seconds)
        if compiled:
            ratios = (*ratios, median["diffusers, compiled"] / seconds)
        rows.append((name, f"{seconds * 1e3:.0f}", said, *map(_two, ratios)))
    apart = "; ".join(f"{name}: {off.abs().max():.1e}" for name, off in outputs.items())
    return (
        f"## {str(dtype).removeprefix('torch.')}\n\n{summary.table(rows)}\n\n"
        f"Largest differences of outputs: {apart}.{notes}"
    )


def _two(ratio: float) -> str:
    return f"{ratio:.2f}"


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
