from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextdit_core import Conditioning, NextDiT, NextDiTConfig, Tokens, UserError


def _grid(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
    )


@pytest.fixture(scope="module")
def reference_model(golden: Path) -> NextDiT:
    """The tiny random model of the reference tensors, with the authors' weights."""
    return NextDiT.from_pretrained(golden / "tiny_official.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fwd_plain_16x16", {}),
        ("fwd_masked_12x20", {}),
        ("fwd_prop_24x24_noscale", {"scale": "proportional", "trained_tokens": 64}),
    ],
)
def test_velocity_equals_the_authors(
    golden: Path,
    reference_model: NextDiT,
    on_latents: Callable[..., Tensor],
    parity: Callable[..., None],
    name: str,
    options: dict[str, object],
) -> None:
    case = load_file(golden / f"{name}.safetensors")
    out = on_latents(reference_model, case, **options)
    parity(f"forward, {name}", out, case["out_official"])


@pytest.mark.parametrize("name", ["fwd_extrap_linear_24x24", "fwd_extrap_ntk_24x24"])
def test_velocity_beyond_the_trained_size_equals_the_authors(
    golden: Path,
    reference_model: NextDiT,
    on_latents: Callable[..., Tensor],
    parity: Callable[..., None],
    name: str,
) -> None:
    """The released switch: interpolation before t = 0.3, a larger base after it."""
    rope = reference_model.rope.extrapolate("time-aware-watershed", scale=(1.0, 1.5, 1.5))
    case = load_file(golden / f"{name}.safetensors")
    out = on_latents(reference_model, case, rope=rope, scale="proportional", trained_tokens=64)
    parity(f"forward, {name}", out, case["out_official"])


def _model(random: torch.Generator, **sizes: int) -> NextDiT:
    """A small model in which no weight is zero."""
    config = NextDiTConfig(**({"token_dim": 4, "width": 32, "heads": 4, "layers": 2} | sizes))
    model = NextDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return model.eval()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_packed_batch_equals_samples_alone(random: torch.Generator, axes: int) -> None:
    width = 48 if axes == 3 else 32
    model = _model(random, axes=axes, kv_heads=2, text_dim=8, width=width)
    shapes = [(2, 3), (4, 4), (1, 1)]
    samples = [
        Tokens(torch.randn(r * c, 4, generator=random), _grid(r, c), (r * c,)) for r, c in shapes
    ]
    t = torch.tensor([0.1, 0.5, 0.9])
    text = Conditioning(torch.randn(3, 6, 8, generator=random), torch.tensor([6, 2, 4]))
    with torch.no_grad():
        packed = model(Tokens.pack(samples), t, text)
        alone = [
            model(one, t[i : i + 1], Conditioning(text.text[i : i + 1], text.lengths[i : i + 1]))
            for i, one in enumerate(samples)
        ]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5


def test_every_packed_sample_has_the_angles_of_its_own_time(random: torch.Generator) -> None:
    model = _model(random, axes=2)
    rope = model.rope.extrapolate("time-aware", scale=(1.0, 8.0, 8.0))
    samples = [
        Tokens(torch.randn(r * c, 4, generator=random), _grid(r, c), (r * c,))
        for r, c in [(2, 3), (4, 4)]
    ]
    t = torch.tensor([0.1, 0.8])
    with torch.no_grad():
        packed = model(Tokens.pack(samples), t, rope=rope)
        alone = [model(one, t[i : i + 1], rope=rope) for i, one in enumerate(samples)]
        elsewhen = model(samples[0], torch.tensor([0.1]))
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5
    assert (alone[0] - elsewhen).abs().max() > 1e-4


def test_prepared_conditioning_gives_the_same_velocity(random: torch.Generator) -> None:
    model = _model(random, text_dim=8)
    tokens = Tokens(torch.randn(6, 4, generator=random), _grid(2, 3), (6,))
    text = Conditioning(torch.randn(1, 5, 8, generator=random), torch.tensor([3]))
    t = torch.tensor([0.3])
    with torch.no_grad():
        assert torch.equal(model(tokens, t, text), model(tokens, t, model.prepare(text)))


def test_text_past_its_length_changes_nothing(random: torch.Generator) -> None:
    model = _model(random, text_dim=8)
    tokens = Tokens(torch.randn(6, 4, generator=random), _grid(2, 3), (6,))
    text = torch.randn(1, 5, 8, generator=random)
    other = text.clone()
    other[:, 3:] = 1e3
    lengths, t = torch.tensor([3]), torch.tensor([0.3])
    with torch.no_grad():
        one = model(tokens, t, Conditioning(text, lengths))
        two = model(tokens, t, Conditioning(other, lengths))
    assert torch.equal(one, two)


def test_a_new_model_predicts_zero() -> None:
    model = NextDiT(NextDiTConfig(token_dim=4, width=32, heads=4, layers=2, text_dim=8))
    tokens = Tokens(torch.randn(6, 4), _grid(2, 3), (6,))
    text = Conditioning(torch.randn(1, 5, 8), torch.tensor([5]))
    assert model(tokens, torch.tensor([0.5]), text).abs().max() == 0.0


def test_every_parameter_gets_a_gradient(random: torch.Generator) -> None:
    model = _model(random, text_dim=8, kv_heads=2)
    tokens = Tokens(torch.randn(6, 4, generator=random), _grid(2, 3), (6,))
    text = Conditioning(torch.randn(1, 5, 8, generator=random), torch.tensor([5]))
    model(tokens, torch.tensor([0.5]), text).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30}, "not a multiple of model.heads"),
        ({"kv_heads": 3}, "not a multiple of model.kv_heads"),
        ({"axes": 4}, "expected 1, 2 or 3"),
        ({"axes": 3}, "rotary embedding over 3 axes"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NextDiTConfig(**({"token_dim": 4, "width": 32, "heads": 4} | change))


def test_arguments_that_do_not_fit_are_refused(random: torch.Generator) -> None:
    tokens = Tokens(torch.randn(6, 4), _grid(2, 3), (6,))
    plain, textual = _model(random), _model(random, text_dim=8)
    text = Conditioning(torch.randn(1, 5, 9), torch.tensor([5]))
    with pytest.raises(ValueError, match="t has shape"):
        plain(tokens, torch.tensor(0.5))
    with pytest.raises(ValueError, match="takes text of width 8"):
        textual(tokens, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="have width 9"):
        textual(tokens, torch.tensor([0.5]), text)
