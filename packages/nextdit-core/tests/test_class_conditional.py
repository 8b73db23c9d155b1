"""The class-conditional Next-DiT, against the authors' own network.

`recorded/class_conditional.safetensors` holds weights (exact in bfloat16), inputs and the output of
`DiT_Llama` of Next-DiT-ImageNet (Alpha-VLLM/Lumina-T2X 1c60696) in float32, with torch's linear
and embedding layers in the place of fairscale's: dim 32, 2 layers, 4 heads, 2 key heads,
multiple_of 16, 10 classes, QK-norm, and random weights, none of them zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rope3d
from nextdit_core import NextDiT, NextDiTConfig, Tokens, UserError
from nextdit_core.checkpoints.recognise import Layout, recognise


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "recorded" / "class_conditional.safetensors")


@pytest.fixture
def folder(recorded: dict[str, Tensor], tmp_path: Path) -> Path:
    weights = {
        name.removeprefix("weights."): tensor.float()
        for name, tensor in recorded.items()
        if name.startswith("weights.")
    }
    torch.save(weights, tmp_path / "consolidated.00-of-01.pth")
    return tmp_path


def _velocity(model: NextDiT, case: dict[str, Tensor], labels: Tensor) -> Tensor:
    x = case["x"]
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    patches = x.unflatten(2, (rows, 2)).unflatten(4, (columns, 2))
    values = patches.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4 * channels)
    positions = rope3d.grid(frames=1, height=rows, width=columns).repeat(batch, 1)
    tokens = Tokens(values, positions, (rows * columns,) * batch)
    with torch.no_grad():
        out = model(tokens, case["t"], model.prepare_classes(labels))
    return out.view(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def test_velocity_equals_the_authors(
    folder: Path, recorded: dict[str, Tensor], parity: Callable[..., None]
) -> None:
    model = NextDiT.from_pretrained(folder, heads=4)
    assert (model.config.classes, model.config.final_shift) == (10, True)
    assert (model.config.kv_heads, model.config.text_dim) == (2, None)
    out = _velocity(model, recorded, recorded["y"])
    parity("class-conditional", out, recorded["out"])


def test_it_is_kept_in_our_layout_and_the_authors(
    folder: Path, recorded: dict[str, Tensor], tmp_path: Path
) -> None:
    model = NextDiT.from_pretrained(folder, heads=4)
    model.save_pretrained(tmp_path / "ours")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert recognise(shapes) is Layout.OWN
    back = NextDiT.from_pretrained(tmp_path / "ours")
    assert torch.equal(
        _velocity(back, recorded, recorded["y"]), _velocity(model, recorded, recorded["y"])
    )
    with pytest.raises(UserError, match="it has no text"):
        model.save_pretrained(tmp_path / "theirs", layout="diffusers")
    back.save_pretrained(tmp_path / "theirs", layout="authors")
    written = load_file(tmp_path / "theirs" / "consolidated.00-of-01.safetensors")
    for name, tensor in written.items():
        expected = recorded[f"weights.{name}"].float()
        if name.startswith("final_layer.linear."):  # the half that is thrown away is zeros
            tensor, expected = (one.unflatten(0, (4, 8))[:, :4] for one in (tensor, expected))
        assert torch.equal(tensor, expected), name
    assert {f"weights.{name}" for name in written} == {n for n in recorded if "weights" in n}


def test_norms_that_theirs_lacks_go_into_the_scales(
    folder: Path, recorded: dict[str, Tensor], tmp_path: Path, random: torch.Generator
) -> None:
    model = NextDiT.from_pretrained(folder, heads=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm1" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
    model.save_pretrained(tmp_path / "theirs", layout="authors")
    back = NextDiT.from_pretrained(tmp_path / "theirs", heads=4)
    assert (back.layers[0].attention_norm1.weight == 1).all()  # type: ignore[union-attr]
    one, other = (_velocity(each, recorded, recorded["y"]) for each in (model, back))
    assert (one - other).abs().max() <= 1e-5
    assert (one - recorded["out"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "it has no text"),  # what the text-to-image layout says
        ({"text_dim": 8}, "it has text beside classes"),
        ({"final_shift": False}, "its final layer does not shift"),
        ({"axes": 1}, "its positions have 1 axes"),
        ({"norm_eps": 1e-6}, "its norm_eps is 1e-06"),
        ({"token_dim": 6}, "no 2x2 patches"),
        ({"time_experts": 4, "experts_per_token": 1}, "pass through 1 experts, theirs through 2"),
    ],
)
def test_a_backbone_that_theirs_cannot_be_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {"token_dim": 4, "width": 32, "layers": 1, "classes": 3, "final_shift": True}
    with pytest.raises(UserError, match=message):
        NextDiT(NextDiTConfig(**(sizes | changes))).save_pretrained(
            tmp_path / "out", layout="authors"
        )


def test_heads_that_no_tensor_tells_are_asked_for(folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"no tensor tells the number of heads, and width 32 is of no release; give heads "
        r"\(--heads on the command line\)\. Those that fit the shapes: 2, 4, 8",
    ):
        NextDiT.from_pretrained(folder)
    with pytest.raises(UserError, match="5 heads do not fit width 32 and 16 key channels"):
        NextDiT.from_pretrained(folder, heads=5)
    file = folder / "consolidated.00-of-01.pth"
    weights = torch.load(file, weights_only=True)
    del weights["layers.1.ffn_norm.weight"]
    save_file(weights, file.with_suffix(".safetensors"))
    with pytest.raises(UserError, match=r"1 missing: layers\.1\.ffn_norm\.weight"):
        NextDiT.from_pretrained(folder, heads=4)


def test_classes_that_do_not_fit_are_refused() -> None:
    tokens = Tokens(torch.randn(6, 4), torch.zeros(6, 3), (6,))
    config = NextDiTConfig(token_dim=4, width=32, heads=4, layers=1, classes=3)
    model = NextDiT(config)
    with pytest.raises(ValueError, match=r"takes one of 3 classes; give it prepare_classes"):
        model(tokens, torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"labels have shape \(1, 1\)"):
        model.prepare_classes(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="takes no classes"):
        NextDiT(NextDiTConfig(token_dim=4, width=32, heads=4, layers=1)).prepare_classes(
            torch.tensor([1])
        )
    with pytest.raises(UserError, match=r"model\.classes is 0; expected at least 1"):
        NextDiTConfig(token_dim=4, classes=0)
