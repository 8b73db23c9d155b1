"""The operations of a block as nextdit-core finds them, and a whole backbone that runs on them."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from nextdit_kernels import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
core = pytest.importorskip("nextdit_core", reason="nextdit-core is not installed; not required")


@pytest.fixture
def backbone():
    """A small backbone in which no weight is zero, two packed samples, their times and their text.

    Samples of one length are a dense batch, of different lengths one packed row.
    """

    def build(lengths: tuple[int, ...]):
        torch.manual_seed(0)
        sizes = {"token_dim": 4, "width": 48, "heads": 4, "kv_heads": 2, "layers": 2}
        model = core.NextDiT(core.NextDiTConfig(**sizes, axes=2, text_dim=8))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        count = sum(lengths)
        values, positions = torch.randn(count, 4), torch.rand(count, 3) * 9
        tokens = core.Tokens(values.to(DEVICE), positions.to(DEVICE), lengths)
        text = torch.randn(2, 5, 8).to(DEVICE), torch.tensor([5, 2], device=DEVICE)
        return model.to(DEVICE), tokens, core.Conditioning(*text)

    return build


def velocity_and_gradients(backbone, lengths) -> list[torch.Tensor]:
    model, tokens, text = backbone(lengths)
    velocity = model(tokens, torch.tensor([0.2, 0.7], device=DEVICE), text)
    velocity.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [velocity, *(gradient for gradient in gradients if gradient is not None)]


def test_entry_point_leads_to_the_operations() -> None:
    (entry,) = entry_points(group="nextdit.kernels", name="triton")
    assert entry.load() is BLOCK
    assert BLOCK.name == "triton"


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9)], ids=["dense", "packed"])
def test_backbone_equals_its_pytorch_form(backbone, monkeypatch, lengths) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "torch")
    expected = velocity_and_gradients(backbone, lengths)
    monkeypatch.setenv("NEXTDIT_KERNELS", "triton")
    calls = []
    for operation in ("swiglu", "norm_modulate", "gate_residual", "norm_rotate"):
        method = getattr(type(BLOCK), operation)

        def counted(*arguments, operation=operation, method=method, **numbers):
            calls.append(operation)
            return method(*arguments, **numbers)

        monkeypatch.setattr(type(BLOCK), operation, counted)
    ours = velocity_and_gradients(backbone, lengths)
    assert len(calls) == 2 * 6 + 1
    assert len(ours) == len(expected)
    for mine, theirs in zip(ours, expected, strict=True):
        atol = 1e-5 * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


def test_rotations_that_the_kernel_does_not_know_are_refused() -> None:
    rope3d = pytest.importorskip("rope3d", reason="rope3d is not installed; it is not required")
    q = torch.zeros(1, 5, 2, 8, device=DEVICE)
    positions = torch.zeros(5, 1, device=DEVICE)
    served = rope3d.axial((8,)).rotation(positions)
    assert BLOCK.why_not_norm_rotate(q, q, served) is None
    for rope in (rope3d.axial((8,), pairing="half"), rope3d.axial((4,)).partial(8)):
        assert "all adjacent pairs" in BLOCK.why_not_norm_rotate(q, q, rope.rotation(positions))
    learned = rope3d.LearnedRope(rope3d.axial((8,))).to(DEVICE).rotation(positions)
    assert "requires a gradient" in BLOCK.why_not_norm_rotate(q, q, learned)


def test_backbone_compiles_with_them(backbone, monkeypatch) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "triton")
    model, tokens, text = backbone((6, 6))
    t = torch.tensor([0.2, 0.7], device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, t, text), model(tokens, t, text))


@pytest.mark.parametrize(
    "code",
    [
        "import nextdit_core.backbone, sys; assert 'triton' not in sys.modules",
        "import nextdit_kernels.block, sys; assert 'nextdit_core' not in sys.modules",
    ],
    ids=["core-stays-light", "knows-nobody"],
)
def test_in_a_fresh_process(code) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
