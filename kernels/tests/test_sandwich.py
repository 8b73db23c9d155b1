"""The kernels against PyTorch's norms and autograd in float64, in the interpreter or on a GPU."""

import functools
import math

import pytest
import torch
from torch.nn import functional

from nextdit_kernels import sandwich

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
ROUNDING = {  # of one number, relative; Triton's interpreter truncates to bfloat16
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,
}
SHAPES = {
    "one-number": (1, 1, 1),
    "one-row": (1, 1, 24),
    "samples": (2, 3, 96),
    "odd-width": (3, 7, 5),
    "several-programs": (2, 70, 16),
    "wide": (1, 3, 1030),
    "no-samples": (0, 3, 8),
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
MODULATIONS = {
    "chunk": lambda draw: draw(2, 96).chunk(4, -1)[2],
    "chunk-with-a-token-dimension": lambda draw: draw(2, 96)[:, None].chunk(4, -1)[2],
    "chunk-per-token": lambda draw: draw(2, 9, 96).chunk(4, -1)[1],
    "same-for-all-samples": lambda draw: draw(1, 24).expand(2, -1),
    "same-for-all-tokens": lambda draw: draw(2, 1, 24).expand(-1, 9, -1),
    "channels-first": lambda draw: draw(24, 2).t(),
}


@pytest.fixture
def draw():
    """Random tensors, standard normal."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill outputs with NaN before the kernels run, so that what they leave unwritten shows."""

    def poison(made):
        return lambda *inputs: torch.utils._pytree.tree_map(
            lambda output: output.fill_(math.nan), made(*inputs)
        )

    for name in ("_outputs", "_gradients", "_partial"):
        monkeypatch.setattr(sandwich, name, poison(getattr(sandwich, name)))


def norm_modulate(x, weight, scale):
    return sandwich.norm_modulate(x, weight, scale, eps=EPS)


def centre_modulate(x, weight, scale):
    return sandwich.norm_modulate(x, None, scale, eps=EPS, centred=True)


def gate_residual(x, weight, gate, residual):
    return sandwich.gate_residual(residual, x, weight, gate, eps=EPS)


def plain(operation, x, weight, m, *residual):
    """What PyTorch computes, in the dtype of the inputs."""
    m = m if m.ndim == 3 else m[:, None]
    if operation is norm_modulate:
        return functional.rms_norm(x, x.shape[-1:], weight, EPS) * (1 + m)
    if operation is centre_modulate:
        return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + m)
    return residual[0] + torch.tanh(m) * functional.rms_norm(x, x.shape[-1:], weight, EPS)


OPERATIONS = [norm_modulate, centre_modulate, gate_residual]
several = pytest.mark.parametrize("operation", OPERATIONS)


def check(operation, x, weight, m, residual, grad) -> None:
    inputs = [x, weight, m, residual][: 4 if operation is gate_residual else 3]
    before = [tensor.clone() for tensor in inputs]
    asked = [0, 2] if operation is centre_modulate else range(len(inputs))
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in inputs if t is not weight))
    grad = grad.to(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = operation(*leaves)
    assert out.dtype == dtype
    ours = (out, *torch.autograd.grad(out, [leaves[i] for i in asked], grad))
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = plain(operation, *doubles)
    theirs = (exact, *torch.autograd.grad(exact, [doubles[i] for i in asked], grad.double()))
    dtypes = (dtype, *(inputs[i].dtype for i in asked))
    for mine, expected, kind in zip(ours, theirs, dtypes, strict=True):
        assert mine.dtype == kind
        assert mine.shape == expected.shape
        rounding = ROUNDING[kind] * 1.01
        atol = 3e-6 * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
        torch.testing.assert_close(mine.double(), expected, atol=atol, rtol=rounding)
    assert out.is_contiguous()
    assert all(torch.equal(now, old) for now, old in zip(inputs, before, strict=True))


@several
@pytest.mark.parametrize("per_token", [False, True], ids=["per-sample", "per-token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", ROUNDING)
def test_value_and_gradients_equal_float64_rounded_once(
    draw, operation, per_token, shape, dtype
) -> None:
    batch, tokens, width = shape
    x, residual, grad = (draw(*shape, dtype=dtype) for _ in range(3))
    m = draw(batch, tokens, width, dtype=dtype) if per_token else draw(batch, width, dtype=dtype)
    check(operation, x, draw(width, dtype=dtype), m, residual, grad)


@several
def test_widest_row(draw, operation) -> None:
    x, residual, grad = (draw(1, 2, sandwich.MAX_WIDTH) for _ in range(3))
    check(operation, x, draw(x.shape[-1]), draw(1, x.shape[-1]), residual, grad)


@several
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides_of_rows(draw, operation, layout) -> None:
    x, residual, grad = (draw(2, 9, 24) for _ in range(3))
    weight, m = draw(48)[::2], draw(2, 24)
    varied = layout(draw)
    if operation is not centre_modulate or any(varied.stride()):
        # Of a constant row, centred, only the rounding of its mean is left, over sqrt(eps).
        check(operation, varied, weight, m, residual, grad)
    check(operation, x, weight, m, layout(draw), grad)
    check(operation, x, weight, m, residual, layout(draw))


@several
@pytest.mark.parametrize("layout", MODULATIONS.values(), ids=MODULATIONS.keys())
def test_any_strides_of_the_modulation(draw, operation, layout) -> None:
    x, residual, grad = (draw(2, 9, 24) for _ in range(3))
    check(operation, x, draw(24), layout(draw), residual, grad)


@several
@pytest.mark.parametrize(
    ("rows", "m", "residual"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_autocast(draw, operation, rows, m, residual) -> None:
    x, m, residual = draw(2, 9, 24, dtype=rows), draw(2, 24, dtype=m), draw(2, 9, 24).to(residual)
    check(operation, x, draw(24), m, residual, draw(2, 9, 24))


@several
def test_gates_of_any_size(draw, operation) -> None:
    m = torch.tensor([0.0, 1e-30, -1e-4, 0.249, 0.251, -1.0, 9.0, -90.0], device=DEVICE)
    x, residual, grad = (draw(1, 9, 8) for _ in range(3))
    check(operation, x, draw(8), m[None], residual, grad)


def test_small_gates_keep_their_digits() -> None:
    gate = torch.logspace(-6, 1, 64, device=DEVICE)
    ones = torch.ones(1, 1, 64, device=DEVICE)
    ours = sandwich.gate_residual(0 * ones, ones, ones[0, 0], gate[None], eps=0.0)
    expected = torch.tanh(gate.double())
    torch.testing.assert_close(ours[0, 0].double(), expected, atol=0, rtol=5e-7)


@pytest.mark.parametrize("tokens", [1, 300, 9000])
def test_programs_cover_every_token(tokens) -> None:
    for block_t in (1, 4, 32):
        count = sandwich._tokens_per_program(tokens, block_t)
        assert count % block_t == 0
        assert block_t <= count <= max(block_t, sandwich._MOST)


@pytest.mark.parametrize("asked", range(1, 16))
def test_gradients_to_some_inputs_alone(draw, asked) -> None:
    inputs = [draw(2, 9, 24), draw(2, 9, 24), draw(24), draw(2, 24)]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(asked >> i & 1))
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    y, x, weight, m = inputs
    ours = sandwich.gate_residual(y, x, weight, m, eps=EPS)
    theirs = plain(gate_residual, x, weight, m, y)
    mine, expected = (torch.autograd.grad(out.sum(), leaves) for out in (ours, theirs))
    torch.testing.assert_close(mine, expected, atol=2e-6, rtol=2e-6)


def test_a_layer_norm_may_have_a_weight_and_an_rms_norm_none(draw) -> None:
    x, weight, scale = draw(2, 3, 24), draw(24), draw(2, 24)
    ours = sandwich.norm_modulate(x, weight, scale, eps=EPS, centred=True)
    expected = functional.layer_norm(x, (24,), weight, None, EPS) * (1 + scale[:, None])
    torch.testing.assert_close(ours, expected)
    ours = sandwich.norm_modulate(x, None, scale, eps=EPS)
    expected = functional.rms_norm(x, (24,), None, EPS) * (1 + scale[:, None])
    torch.testing.assert_close(ours, expected)


@several
def test_second_derivative_is_refused(draw, operation) -> None:
    x, residual = draw(2, 3, 24).requires_grad_(), draw(2, 3, 24)
    more = (residual,) if operation is gate_residual else ()
    out = operation(x, draw(24), draw(2, 24), *more)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_keeps_its_inputs_and_one_number_per_row(draw) -> None:
    x, y, weight, gate = (t.requires_grad_() for t in (*draw(2, 2, 3, 24), draw(24), draw(2, 24)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sandwich.gate_residual(x, y, weight, gate, eps=EPS)
    inputs = {t.data_ptr() for t in (y, weight, gate)}
    (rstd,) = [t for t in kept if t.data_ptr() not in inputs]
    assert len(kept) == 4
    assert rstd.shape == (2, 3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("modulation", ["chunk", "chunk-per-token"])
def test_operators_pass_opcheck(draw, grad, modulation) -> None:
    x, y = (LAYOUTS["halves-of-a-projection"](draw).detach() for _ in range(2))
    weight, m = draw(24), MODULATIONS[modulation](draw).detach()
    for tensor in (x, y, weight, m):
        tensor.requires_grad_(grad)
    operators = torch.ops.nextdit_kernels
    torch.library.opcheck(operators.norm_modulate.default, (x, weight, m, EPS, False))
    torch.library.opcheck(operators.norm_modulate.default, (x, None, m, EPS, True))
    torch.library.opcheck(operators.gate_residual.default, (x, y, weight, m, EPS))
    saved = [tensor.detach() for tensor in (y, x, weight, m)]
    for asked in ([True, True, True], [False, True, False]):
        arguments = (*saved, draw(2, 9).abs(), True, False, asked)
        torch.library.opcheck(operators.sandwich_backward.default, arguments)


@several
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(draw, operation, dynamic) -> None:
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 9):
        inputs = [draw(2, tokens, 24), draw(24), draw(2, 24), draw(2, tokens, 24)]
        inputs = [t.requires_grad_() for t in inputs[: 4 if operation is gate_residual else 3]]
        leaves = [t for i, t in enumerate(inputs) if operation is not centre_modulate or i != 1]
        ours, expected = compiled(*inputs), operation(*inputs)
        assert torch.equal(ours, expected)
        mine, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (ours, expected))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


ROWS, VECTOR = torch.zeros(2, 3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("x", "y", "weight", "m", "message"),
    [
        (ROWS, torch.zeros(2, 3, 9), VECTOR, torch.zeros(2, 8), "do not fit"),
        (ROWS, ROWS, torch.zeros(9), torch.zeros(2, 8), "do not fit"),
        (ROWS, ROWS, VECTOR, torch.zeros(3, 8), "do not fit"),
        (ROWS, ROWS, VECTOR, torch.zeros(2, 2, 8), "do not fit"),
        (ROWS, ROWS, VECTOR, VECTOR, "do not fit"),
        (ROWS[0], ROWS[0], VECTOR, torch.zeros(3, 8), "do not fit"),
        (ROWS.double(), ROWS, VECTOR, torch.zeros(2, 8), "x is torch.float64; the kernel takes"),
        (ROWS, ROWS.double(), VECTOR, torch.zeros(2, 8), "y is torch.float64"),
        (ROWS, ROWS, VECTOR.int(), torch.zeros(2, 8), "weight is torch.int32"),
        (torch.zeros(1, 1, 8193),) * 2 + (torch.zeros(8193), torch.zeros(1, 8193), "at most 8192"),
    ],
)
def test_refusals_say_what_is_served(x, y, weight, m, message) -> None:
    x, y, weight, m = (tensor.to(DEVICE) for tensor in (x, y, weight, m))
    with pytest.raises(ValueError, match=message):
        sandwich.gate_residual(x, y, weight, m, eps=EPS)


def test_needs_one_served_device() -> None:
    x, vector = ROWS.to(DEVICE), torch.zeros(8, device="meta")
    assert "needs one device" in sandwich.why_not_norm_modulate(x, vector, x)
    meta = x.to("meta")
    assert "x is on meta" in sandwich.why_not_gate_residual(meta, meta, vector, meta)
