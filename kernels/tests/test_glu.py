"""The kernel against silu and autograd in float64, in the interpreter or on a GPU."""

import math

import pytest
import torch
from torch.nn import functional

from nextdit_kernels import glu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {  # of one number, relative; Triton's interpreter truncates to bfloat16
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,
}
SHAPES = {
    "one-number": (1,),
    "one-row": (24,),
    "rows": (5, 72),
    "samples": (2, 3, 96),
    "odd-width": (3, 7, 5),
    "two-tiles-of-channels": (2, 3, 1030),
    "many-dimensions": (2, 1, 3, 2, 8),
    "no-tokens": (2, 0, 8),
    "no-channels": (2, 3, 0),
}
LAYOUTS = {
    "halves-of-a-projection": lambda draw: draw(2, 9, 2, 24)[:, :, 1],
    "tokens-before-samples": lambda draw: draw(9, 2, 24).transpose(0, 1),
    "every-other-token": lambda draw: draw(2, 18, 24)[:, ::2],
    "every-other-channel": lambda draw: draw(2, 9, 48)[..., ::2],
    "channels-before-tokens": lambda draw: draw(2, 24, 9).transpose(1, 2),
    "odd-row-stride": lambda draw: draw(2, 9, 25)[..., :24],
    "shifted-by-one": lambda draw: draw(2 * 9 * 24 + 1)[1:].view(2, 9, 24),
    "one-token-for-all": lambda draw: draw(2, 1, 24).expand(-1, 9, -1),
    "one-number-for-all": lambda draw: draw(1, 1, 1).expand(2, 9, 24),
}


@pytest.fixture
def draw():
    """Random tensors, normal with standard deviation 3."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(3).to(DEVICE, dtype)

    return normal


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill outputs with NaN before the kernels run, so that what they leave unwritten shows."""
    outputs = glu._outputs

    def poison(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        return tuple(output.fill_(math.nan) for output in outputs(x, count))

    monkeypatch.setattr(glu, "_outputs", poison)


def check(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    before = gate.clone(), up.clone()
    inputs = [x.detach().requires_grad_() for x in (gate, up)]
    out = glu.swiglu(*inputs)
    ours = (out, *torch.autograd.grad(out, inputs, grad))
    doubles = [x.detach().double().requires_grad_() for x in (gate, up)]
    exact = functional.silu(doubles[0]) * doubles[1]
    theirs = (exact, *torch.autograd.grad(exact, doubles, grad.double()))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == gate.dtype
        assert mine.is_contiguous()
        rounding = ROUNDING[gate.dtype]
        torch.testing.assert_close(mine.double(), expected, atol=3e-6, rtol=rounding * 1.01)
    assert all(torch.equal(x, old) for x, old in zip((gate, up), before, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", ROUNDING)
def test_value_and_gradients_equal_float64_rounded_once(draw, shape, dtype) -> None:
    check(*(draw(*shape, dtype=dtype) for _ in range(3)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(draw, layout) -> None:
    x, y, z = layout(draw), draw(2, 9, 24), draw(2, 9, 24)
    check(x, y, z)
    check(y, x, z)
    check(y, z, x)


def test_dimensions_that_do_not_merge_are_copied(draw) -> None:
    check(*(draw(3, 2, 2, 8).transpose(0, 1) for _ in range(3)))


def test_large_gates_saturate_without_nan() -> None:
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=DEVICE)
    check(gate, torch.ones_like(gate), torch.ones_like(gate))


def test_gradient_to_one_input_alone(draw) -> None:
    gate, up = draw(5, 24), draw(5, 24).requires_grad_()
    (gradient,) = torch.autograd.grad(glu.swiglu(gate, up).sum(), up)  # an expanded gradient
    torch.testing.assert_close(gradient, functional.silu(gate))


def test_second_derivative_is_refused(draw) -> None:
    gate, up = draw(5, 24).requires_grad_(), draw(5, 24)
    (first,) = torch.autograd.grad(glu.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_keeps_nothing_but_its_inputs(draw) -> None:
    gate, up = draw(5, 24).requires_grad_(), draw(5, 24).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        glu.swiglu(gate, up)
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["halves-of-a-projection", "tokens-before-samples"])
def test_operators_pass_opcheck(draw, grad, layout) -> None:
    gate, up = (LAYOUTS[layout](draw).detach().requires_grad_(grad) for _ in range(2))
    operators = torch.ops.nextdit_kernels
    torch.library.opcheck(operators.swiglu.default, (gate, up))
    tensors = (draw(2, 9, 24), gate.detach(), up.detach())
    torch.library.opcheck(operators.swiglu_backward.default, tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(draw, dynamic) -> None:
    compiled = torch.compile(glu.swiglu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 9):
        inputs = [draw(2, tokens, 24).requires_grad_() for _ in range(2)]
        ours, expected = compiled(*inputs), glu.swiglu(*inputs)
        assert torch.equal(ours, expected)
        mine, theirs = (torch.autograd.grad(x.square().sum(), inputs) for x in (ours, expected))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(5, 8), torch.zeros(5, 9), "do not fit"),
        (torch.zeros(5, 8), torch.zeros(8), "do not fit"),
        (torch.tensor(1.0), torch.tensor(1.0), "do not fit"),
        (torch.zeros(8).double(), torch.zeros(8).double(), "one of bfloat16, float16, float32"),
        (torch.zeros(8), torch.zeros(8).half(), "gate is torch.float32 and up torch.float16"),
    ],
)
def test_refusals_say_what_is_served(gate, up, message) -> None:
    with pytest.raises(ValueError, match=message):
        glu.swiglu(gate.to(DEVICE), up.to(DEVICE))


def test_needs_one_served_device() -> None:
    x, meta = torch.zeros(8, device=DEVICE), torch.zeros(8, device="meta")
    assert "needs one device" in glu.why_not(x, meta)
    assert "gate is on meta; the kernel needs CUDA" in glu.why_not(meta, meta)
