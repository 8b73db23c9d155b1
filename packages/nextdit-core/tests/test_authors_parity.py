"""Against the authors' code and diffusers: lists, guidance, training, sampling, live models."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import flowsolvers
import rope3d
from nextdit_core import Conditioning, NextDiT, Tokens
from rope3d import attend_products, attention_backends

PATCH, CHANNELS = 2, 4


def _grid(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
    )


def _patchify(latents: Sequence[Tensor]) -> Tokens:
    """Cut `[channels, height, width]` latents into tokens of (row, column, channel)."""
    samples = []
    for latent in latents:
        _, height, width = latent.shape
        rows, columns = height // PATCH, width // PATCH
        parts = latent.unflatten(1, (rows, PATCH)).unflatten(3, (columns, PATCH))
        values = parts.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        samples.append(Tokens(values, _grid(rows, columns), (rows * columns,)))
    return Tokens.pack(samples)


def _unpatchify(values: Tensor, latent: Tensor) -> Tensor:
    """Put tokens together again."""
    _, height, width = latent.shape
    parts = values.view(height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return parts.permute(4, 0, 2, 1, 3).reshape(-1, height, width)


def _text(case: dict[str, Tensor]) -> Conditioning:
    """Move the real tokens to the front: some were recorded with their padding there."""
    mask = case["cap_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)
    features = case["cap_feats"].take_along_dim(order[..., None], 1)
    return Conditioning(features, mask.sum(1))


def _velocities(
    model: NextDiT, latents: Sequence[Tensor], t: Tensor, text: Conditioning, **options: Any
) -> list[Tensor]:
    tokens = _patchify(latents)
    out = tokens.with_values(model(tokens, t, text, **options)).split()
    return [_unpatchify(values, x) for values, x in zip(out, latents, strict=True)]


@pytest.fixture(scope="module")
def golden_model(golden: Path) -> Callable[[], NextDiT]:
    """Read the tiny random model of the reference tensors, from the authors' weights."""
    return lambda: NextDiT.from_pretrained(golden / "tiny_official.safetensors")


def _as_here(name: str, theirs: Tensor) -> Tensor:
    """Order a tensor of the authors as it is here, and leave out what their forward throws away."""
    if name.startswith("final_layer.linear"):
        return theirs.unflatten(0, (PATCH, PATCH, 2 * CHANNELS))[:, :, :CHANNELS].flatten(0, 2)
    if name == "x_embedder.weight":
        return theirs.unflatten(1, (CHANNELS, PATCH, PATCH)).permute(0, 2, 3, 1).flatten(1)
    return theirs


@pytest.mark.parametrize("pad_to", [None, "longest", 300])
def test_packed_and_padded_samples_are_the_authors_padded_list(
    golden: Path,
    golden_model: Callable[[], NextDiT],
    parity: Callable[..., None],
    pad_to: int | str | None,
) -> None:
    case = load_file(golden / "fwd_official_list.safetensors")
    text = _text(case)
    latents = [case["x0"], case["x1"], case["x2"]]
    longest = max(x.shape[1] * x.shape[2] // PATCH**2 for x in latents)
    rows = longest if pad_to == "longest" else pad_to
    with torch.no_grad():
        out = _velocities(golden_model(), latents, case["t"], text, pad_to=rows)
    for index, velocity in enumerate(out):
        form = "packed" if pad_to is None else f"padded to {rows}"
        parity(f"list of three sizes, {form}, sample {index}", velocity, case[f"out{index}"])


def test_loss_gradients_and_a_step_are_the_authors(
    golden: Path, golden_model: Callable[[], NextDiT], parity: Callable[..., None]
) -> None:
    case = load_file(golden / "train_tensor.safetensors")
    model = golden_model()
    clean, noise = ([case[f"x{i}_{j}"] for j in range(3)] for i in (1, 0))
    t, text = case["t"], _text(case)
    latents = [s * x1 + (1 - s) * x0 for s, x1, x0 in zip(t, clean, noise, strict=True)]
    out = _velocities(model, latents, t, text)
    losses = torch.stack(
        [(v - (a - b)).square().mean() for v, a, b in zip(out, clean, noise, strict=True)]
    )
    parity("losses", losses, case["loss"])
    losses.mean().backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = _as_here(name, case[f"grad.{name}"])
        assert parameter.grad is not None
        parity(f"gradient of {name}", parameter.grad, expected)
        compared += 1
    unused = {"grad.pad_token"}
    assert compared == len([k for k in case if k.startswith("grad.") and k not in unused])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    assert norm.item() == pytest.approx(case["grad_norm"].item(), abs=1e-4)
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0).step()
    weights = model.state_dict()
    for key in [key for key in case if key.startswith("after.")]:
        name = key.removeprefix("after.")
        parity(f"after a step, {name}", weights[name], _as_here(name, case[key]))


def _guided(
    model: NextDiT, text: Conditioning, scale: float, shape: Tensor, channels: int = 3
) -> Callable[[Tensor, Tensor], Tensor]:
    """Guide the first channels, as the authors do; the others are those of the condition."""
    prepared = model.prepare(text)
    both = _patchify([shape, shape])

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        values = _patchify([x, x]).values
        out = both.with_values(model(both.with_values(values), t.expand(2), prepared)).split()
        cond, uncond = (_unpatchify(v, x) for v in out)
        led = uncond + scale * (cond - uncond)
        return torch.cat([led[:channels], cond[channels:]])

    return velocity


@torch.no_grad()
def test_guidance_on_three_channels_is_the_authors(
    golden: Path, golden_model: Callable[[], NextDiT], parity: Callable[..., None]
) -> None:
    case = load_file(golden / "fwd_cfg4_16x16.safetensors")
    text = _text(case)
    x = case["x"][0]
    out = _guided(golden_model(), text, 4.0, x)(case["t"][:1], x)
    parity("guided by 4 on three channels", out, case["out_official_cfg"][0])


@torch.no_grad()
@pytest.mark.parametrize("shift", ["None", "1.0", "4.0"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun3", "heun3"), ("rk4", "rk38")],
)
def test_sampler_trajectories_are_the_authors(
    golden: Path,
    golden_model: Callable[[], NextDiT],
    parity: Callable[..., None],
    theirs: str,
    ours: str,
    shift: str,
) -> None:
    """Four steps at guidance 4, every state on the way."""
    case = load_file(golden / "sampler_official.safetensors")
    expected = case[f"{theirs}_n5_shift{shift}"][:, 0]
    text = _text(case)
    noise = case["noise"][0]
    grid = flowsolvers.uniform() if shift == "None" else flowsolvers.shift(float(shift))
    stages = getattr(flowsolvers.method(ours), "stages", 1)
    solution = flowsolvers.solve(
        _guided(golden_model(), text, 4.0, noise),
        noise,
        nfe=4 * stages,
        solver=ours,
        schedule=grid,
        trajectory=True,
    )
    assert solution.trajectory is not None
    assert len(solution.trajectory) == len(expected) == 5
    states = torch.stack(list(solution.trajectory))
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    parity(f"trajectory, {theirs}, shift {shift}", states, expected, bound)


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, int | float | list[int] | None]:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    text_tokens = draw(st.integers(1, 9))
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 4 * draw(st.integers(1, 5)),
        "layers": draw(st.integers(1, 3)),
        "text_dim": 8 * draw(st.integers(1, 4)),
        "multiple_of": draw(st.sampled_from([8, 32, 256])),
        "multiplier": draw(st.sampled_from([None, 0.5, 1.3])),
        "rows": draw(st.integers(1, 6)),
        "columns": draw(st.integers(1, 6)),
        "batch": batch,
        "text_tokens": text_tokens,
        "lengths": draw(st.lists(st.integers(1, text_tokens), min_size=batch, max_size=batch)),
        "linear": draw(st.sampled_from([1.0, 1.5, 2.0])),
        "ntk": draw(st.sampled_from([1.0, 1.7])),
        "trained_tokens": draw(st.sampled_from([None, 4, 64])),
        "seed": draw(st.integers(0, 2**31)),
    }


#: Random configurations that are compared.
CONFIGURATIONS = 60


def _diffusers_model(case: dict, random: torch.Generator) -> Any:
    """Make a model of theirs in which no weight is zero."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=case["heads"] * case["head_dim"],
        num_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_kv_heads=case["kv_heads"],
        multiple_of=case["multiple_of"],
        ffn_dim_multiplier=case["multiplier"],
        cross_attention_dim=case["text_dim"],
        learn_sigma=True,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            size = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=random) * size)
        for block in theirs.layers:  # one weight there stands for two of theirs
            block.attn2.to_q.weight.copy_(block.attn1.to_q.weight)
            block.attn2.norm_q.weight.copy_(block.attn1.norm_q.weight)
            block.attn2.norm_q.bias.copy_(block.attn1.norm_q.bias)
    return theirs


def _from_diffusers(theirs: Any) -> NextDiT:
    """Save theirs as they do, and read it as ours."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return NextDiT.from_pretrained(folder)


@given(case=_cases())
@settings(
    max_examples=CONFIGURATIONS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it only collects
)
def test_any_configuration_computes_what_diffusers_does(
    parity: Callable[..., None], case: dict
) -> None:
    """Random sizes, weights, masks, extrapolation and proportional attention, in one float32."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    random = torch.Generator().manual_seed(case["seed"])
    theirs = _diffusers_model(case, random)
    ours = _from_diffusers(theirs)
    shape = (case["batch"], CHANNELS, PATCH * case["rows"], PATCH * case["columns"])
    x = torch.randn(shape, generator=random)
    t = torch.rand(case["batch"], generator=random)
    features = torch.randn(case["batch"], case["text_tokens"], case["text_dim"], generator=random)
    lengths = torch.tensor(case["lengths"])
    text = Conditioning(features, lengths)
    table = embeddings.get_2d_rotary_pos_embed_lumina(
        case["head_dim"], 8, 8, linear_factor=case["linear"], ntk_factor=case["ntk"]
    )
    options = (
        {} if case["trained_tokens"] is None else {"base_sequence_length": case["trained_tokens"]}
    )
    with torch.no_grad():
        expected = theirs(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=features,
            encoder_mask=text.mask,
            image_rotary_emb=table,
            cross_attention_kwargs=options,
            return_dict=False,
        )[0]
        expected = expected.chunk(2, dim=1)[0]
        tokens = _patchify(list(x))
        rope = rope3d.lumina(case["head_dim"], base=10000.0 * case["ntk"]).on_axes(3, (1, 2))
        positions = tokens.positions / case["linear"]
        scale = None if case["trained_tokens"] is None else "proportional"
        options = {"rope": rope, "scale": scale, "trained_tokens": case["trained_tokens"]}
        out = ours(Tokens(tokens.values, positions, tokens.lengths), t, text, **options)
        exact = ours.double()(
            Tokens(tokens.values.double(), positions, tokens.lengths), t, text, **options
        )
    found = [_unpatchify(v, one) for v, one in zip(tokens.with_values(out).split(), x, strict=True)]
    size = max(1.0, expected.abs().max().item())
    # Some random weights magnify rounding, of theirs as of ours: by as much as ours is off float64.
    rounding = (out - exact).abs().max().item()
    bound = 1e-5 * size + 4.0 * rounding
    parity("diffusers, random configurations", torch.stack(found), expected, bound)
    assert rounding <= 1e-3 * size


@pytest.mark.parametrize("rounded", [False, True], ids=["float32 scores", "rounded scores"])
@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_is_as_near_to_float32_as_in_diffusers(
    seed: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square over a batch, each against its own float32."""
    monkeypatch.setattr(attention_backends, "_products_pay", lambda: rounded)
    monkeypatch.setattr(attend_products, "_FEW", 0)
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    case = {
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 48,
        "layers": 4,
        "text_dim": 64,
        "multiple_of": 64,
        "multiplier": None,
    }
    random = torch.Generator().manual_seed(seed)
    theirs = _diffusers_model(case, random)
    ours = _from_diffusers(theirs)
    x = torch.randn(2, CHANNELS, 24, 16, generator=random)
    t = torch.rand(2, generator=random)
    text = Conditioning(torch.randn(2, 12, 64, generator=random), torch.tensor([12, 5]))
    table = embeddings.get_2d_rotary_pos_embed_lumina(48, 16, 16)

    @torch.no_grad()
    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = theirs.to(dtype)(
            hidden_states=x.to(dtype),
            timestep=t.to(dtype).float(),
            encoder_hidden_states=text.text.to(dtype),
            encoder_mask=text.mask,
            image_rotary_emb=table,
            cross_attention_kwargs={},
            return_dict=False,
        )[0]
        rounded = Conditioning(text.text.to(dtype), text.lengths)
        found = _velocities(ours.to(dtype), list(x.to(dtype)), t.to(dtype).float(), rounded)
        return out.chunk(2, dim=1)[0].float(), torch.stack(found).float()

    (their_exact, our_exact), (their_half, our_half) = run(torch.float32), run(torch.bfloat16)
    theirs_off = (their_half - their_exact).square().mean().sqrt()
    ours_off = (our_half - our_exact).square().mean().sqrt()
    assert 0.0 < ours_off <= 1.1 * theirs_off
