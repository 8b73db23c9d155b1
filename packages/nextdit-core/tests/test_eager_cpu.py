"""The quicker ways on the CPU: the same numbers, and only where nobody looks on."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from nextdit_core import (
    Conditioning,
    NextDiT,
    NextDiTConfig,
    Tokens,
    block_operations,
    block_rows,
    eager_cpu,
)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def on_amd(monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(eager_cpu, "_prefers_onednn", lambda: True)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, for forward derivatives
def test_whoever_looks_is_noticed(draw) -> None:
    x = draw(3, 3)
    seen: list[bool] = []

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.append(eager_cpu.unobserved(y))
        return y * 2

    look(x)
    look(x.requires_grad_())
    with torch.no_grad():
        look(x)
        look(nn.Parameter(x))
        with torch.autocast("cpu", torch.bfloat16):
            look(x)
        with FlopCounterMode(display=False):
            look(x)
        torch.func.vmap(look)(x)
        with forward_ad.dual_level():
            look(forward_ad.make_dual(x, x))
        look(x.to("meta"))
        look(nn.Buffer(x).as_subclass(type("Own", (torch.Tensor,), {})))
    assert seen == [True, False, True, True] + [False] * 6
    torch.func.grad(lambda x: look(x).sum())(x.detach())
    assert len(seen) == 11
    assert not seen[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["one", "per sample", "per token"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_at_a_time_equal_the_formula(draw, dtype, form, threads, monkeypatch) -> None:
    monkeypatch.setattr(block_rows, "_BLOCK", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    samples, tokens = {"one": (1, 1), "per sample": (3, 1), "per token": (3, 37)}[form]
    x, y = (draw(3, 37, 24).to(dtype) for _ in range(2))
    weight, factor = draw(24).to(dtype), draw(samples, tokens, 24).to(dtype)
    cases = [
        (block_operations.norm_modulate, (x, weight, factor)),
        (block_operations.gate_residual, (x, y, weight, factor)),
    ]
    for operation, tensors in cases:
        assert block_rows.serves(*tensors)
        expected = operation(*(tensor.double() for tensor in tensors), eps=1e-5)
        found = operation(*tensors, eps=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(block_rows, "serves", lambda *_: False)
            other = operation(*tensors, eps=1e-5)
            exact = operation(*(tensor.double() for tensor in tensors), eps=1e-5)
        torch.testing.assert_close(expected, exact, atol=1e-12, rtol=1e-12)
        assert found.dtype == dtype
        assert rms(found - exact) <= 1.2 * rms(other - exact) + 1e-15
        assert found.data_ptr() not in {tensor.data_ptr() for tensor in tensors}


def test_gradients_go_the_recorded_way(draw, monkeypatch) -> None:
    monkeypatch.setattr(block_rows, "_BLOCK", 1)
    x, gate = draw(2, 5, 8).double().requires_grad_(), draw(2, 1, 8).double()
    weight = nn.Parameter(draw(8).double())
    assert torch.autograd.gradcheck(
        lambda x, w: block_operations.gate_residual(x, x, w, gate, eps=1e-5), (x, weight)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 512, 96), (700, 96), (2, 3, 100, 96)])
def test_linear_equals_float64(draw, on_amd, bias, shape) -> None:
    layer = nn.Linear(96, 40, bias=bias)
    x = draw(*shape)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.inference_mode():
        found = eager_cpu.linear(layer, x)
        other = layer(x)
        strided = eager_cpu.linear(layer, x.transpose(0, -2).contiguous().transpose(0, -2))
    assert rms(found - exact) <= 2 * rms(other - exact)
    assert rms(strided - exact) <= 2 * rms(other - exact)


def test_a_linear_layer_that_is_more_is_called(draw, on_amd, monkeypatch) -> None:
    monkeypatch.setattr(eager_cpu, "_FEW", 0)
    x, calls = draw(64, 8), []

    class Adapted(nn.Linear):
        def forward(self, x):
            calls.append("adapted")
            return super().forward(x)

    hooked, before = nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: calls.append("after"))
    before.register_forward_pre_hook(lambda *_: calls.append("before"))
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: calls.append("replaced")
    with torch.no_grad():
        for layer in (Adapted(8, 8), hooked, before, replaced):
            eager_cpu.linear(layer, x)
        everywhere = register_module_forward_hook(lambda *_: calls.append("everywhere"))
        eager_cpu.linear(nn.Linear(8, 8), x)
        everywhere.remove()
        with FlopCounterMode(display=False) as counter:
            eager_cpu.linear(nn.Linear(8, 8), x)
    assert calls == ["adapted", "after", "before", "replaced", "everywhere"]
    assert counter.get_total_flops() == 2 * 64 * 8 * 8
    double = nn.Linear(8, 8).double()
    assert eager_cpu.linear(double, x.double()).dtype == torch.float64


@torch.no_grad()
def test_the_backbone_gives_the_same_either_way(draw, on_amd, monkeypatch) -> None:
    monkeypatch.setattr(eager_cpu, "_FEW", 0)
    monkeypatch.setattr(block_rows, "_BLOCK", 64)
    model = NextDiT(NextDiTConfig.named("tiny", token_dim=8, text_dim=16))
    for parameter in model.parameters():
        parameter.add_(0.05 * draw(*parameter.shape))
    tokens = Tokens(draw(50, 8), draw(50, 3).round(), (20, 30))
    condition = Conditioning(draw(2, 6, 16), torch.tensor([6, 3]))
    t = torch.tensor([0.2, 0.9])
    quick = model(tokens, t, condition)
    with FlopCounterMode(display=False):  # it looks on
        plain = model(tokens, t, condition)
    assert not torch.equal(quick, plain)
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)
    gate, up = draw(4, 8), draw(4, 8)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(block_operations.swiglu(gate, up), expected)
