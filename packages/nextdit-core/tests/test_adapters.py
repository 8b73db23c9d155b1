"""LoRA by peft and int8 weights by torchao, by the names of the linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rope3d
from nextdit_core import Conditioning, NextDiT, NextDiTConfig, Tokens

PROJECTIONS = ["wq", "wk", "wv", "wo", "wk_y", "wv_y", "w1", "w2", "w3"]

Batch = tuple[Tokens, Tensor, Conditioning]


@pytest.fixture
def backbone(random: torch.Generator) -> NextDiT:
    """A small text-to-image backbone in which no weight is zero."""
    config = NextDiTConfig(
        token_dim=16, width=64, layers=2, heads=4, kv_heads=2, text_dim=32, multiple_of=32
    )
    model = NextDiT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            scale = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.2
            parameter.copy_(noise * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


@pytest.fixture
def batch(random: torch.Generator) -> Batch:
    positions = rope3d.grid(frames=1, height=3, width=4).repeat(2, 1)
    tokens = Tokens(torch.randn(24, 16, generator=random), positions, (12, 12))
    text = Conditioning(torch.randn(2, 6, 32, generator=random), torch.tensor([6, 3]))
    return tokens, torch.tensor([0.2, 0.8]), text


def test_a_lora_is_trained_saved_loaded_and_merged(
    backbone: NextDiT, batch: Batch, random: torch.Generator, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    backbone.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        plain = backbone(*batch)
    target = plain + torch.randn(plain.shape, generator=random) * 0.3

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS)
    adapted: Any = peft.get_peft_model(backbone, config)
    wrapped = [n for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == len(PROJECTIONS) * 2
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (adapted(*batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    count = sum(parameter.numel() for parameter in trained)
    print(f"\nLoRA: {count} numbers, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        expected = adapted(*batch)
    assert (expected - plain).abs().max() > 0.05

    adapted.save_pretrained(tmp_path / "lora")
    base = NextDiT.from_pretrained(tmp_path / "base")
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    loaded: Any = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    with torch.no_grad():
        assert (loaded(*batch) - expected).abs().max() <= 1e-6

    merged = loaded.merge_and_unload()
    assert isinstance(merged, NextDiT)
    assert merged.state_dict().keys() == before.keys()
    merged.save_pretrained(tmp_path / "merged", layout="diffusers")
    again = NextDiT.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (again(*batch) - expected).abs().max() <= 1e-5


def test_int8_weights_compute_what_their_values_say(backbone: NextDiT, batch: Batch) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed", exc_type=ImportError
    )
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        plain = backbone(*batch)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS

    names = [name for name, module in backbone.named_modules() if chosen(module, name)]
    quantization.quantize_(backbone, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    with torch.no_grad():
        out = backbone(*batch)
    relative = ((out - plain).norm() / plain.norm()).item()
    print(f"\nint8 weights: {len(names)} layers, relative deviation {relative:.4f}")
    assert 0 < relative < 0.03

    # The same numbers as ordinary float weights, each within half a step of the original.
    original = NextDiT(backbone.config).eval()
    weights = {}
    for name, tensor in backbone.state_dict().items():
        weights[name] = tensor.dequantize() if name.removesuffix(".weight") in names else tensor
    original.load_state_dict(weights)
    with torch.no_grad():
        assert (original(*batch) - out).abs().max() <= 1e-5
    for name in names:
        old = before[f"{name}.weight"]
        step = old.abs().amax(dim=1, keepdim=True) / 127.5
        assert ((weights[f"{name}.weight"] - old).abs() <= 0.501 * step).all(), name
