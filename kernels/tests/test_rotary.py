"""The kernel against complex multiplication in float64, in the interpreter or on a GPU."""

import math

import pytest
import torch

from nextdit_kernels import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {  # half a unit in the last place of values below 4; Triton's interpreter truncates
    torch.float32: 1e-6,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6 if torch.cuda.is_available() else 2.0**-5,
}
SHAPES = {  # batch, tokens, heads, kv_heads, head_dim
    "one-head-one-token": (1, 1, 1, 1, 8),
    "one-pair": (1, 3, 2, 1, 2),
    "odd-length": (2, 37, 3, 3, 24),
    "grouped": (1, 33, 12, 4, 64),
    "lumina": (1, 19, 32, 8, 72),
    "more-key-heads": (3, 5, 2, 9, 96),
    "wide": (2, 17, 9, 3, 128),
    "widest": (1, 9, 2, 1, 256),
    "no-tokens": (2, 0, 4, 2, 72),
    "no-samples": (0, 5, 4, 2, 72),
    "no-key-heads": (1, 5, 4, 0, 72),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def draw():
    """Random tensors in [-1, 1), and the cosine and sine of random angles."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        numbers = torch.rand(*shape, generator=generator).mul(2).sub(1)
        return numbers.to(DEVICE, dtype)

    def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = uniform(*shape).double() * 100
        return angle.cos().float(), angle.sin().float()

    uniform.angles = angles
    return uniform


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill outputs with NaN before the kernel runs, so that what it leaves unwritten shows."""
    outputs = rotary._outputs

    def poison(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = outputs(q, k)
        for output in both:
            output.fill_(math.nan)
        return both

    monkeypatch.setattr(rotary, "_outputs", poison)


def complex_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def check(q, k, cos, sin) -> None:
    before = q.clone(), k.clone()
    for ours, x, old in zip(rotary.rotate(q, k, cos, sin), (q, k), before, strict=True):
        assert ours.dtype == x.dtype
        assert ours.shape == x.shape
        assert ours.is_contiguous()
        assert torch.equal(x, old)
        expected = complex_rotation(x, cos, sin)
        torch.testing.assert_close(ours.double(), expected, atol=TOLERANCE[x.dtype], rtol=0)


@each_shape
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_complex_multiplication(draw, shape, dtype) -> None:
    batch, tokens, heads, kv_heads, width = shape
    q = draw(batch, tokens, heads, width, dtype=dtype)
    k = draw(batch, tokens, kv_heads, width, dtype=dtype)
    check(q, k, *draw.angles(tokens, width // 2))


@pytest.mark.parametrize("head_dim", [24, 72])
def test_packed_tokens(draw, head_dim) -> None:
    q, k = draw(41, 5, head_dim), draw(41, 2, head_dim)
    check(q, k, *draw.angles(41, head_dim // 2))


@pytest.mark.parametrize("batch", [1, 3])
def test_angles_of_each_sample_or_of_all(draw, batch) -> None:
    q, k = draw(3, 18, 4, 24), draw(3, 18, 2, 24)
    cos, sin = draw.angles(batch, 18, 12)
    check(q, k, cos, sin)
    check(q, k, cos[:1].expand(3, -1, -1), sin[:1].expand(3, -1, -1))


LAYOUTS = {
    "heads-before-tokens": lambda draw: draw(2, 4, 18, 24).transpose(1, 2),
    "slice-of-a-projection": lambda draw: draw(2, 18, 3, 4, 24)[:, :, 1],
    "every-other-token": lambda draw: draw(2, 36, 4, 24)[:, ::2],
    "every-other-channel": lambda draw: draw(2, 18, 4, 48)[..., ::2],
    "channels-before-heads": lambda draw: draw(2, 18, 24, 4).transpose(2, 3),
    "shifted-by-one": lambda draw: draw(2 * 18 * 4 * 24 + 1)[1:].view(2, 18, 4, 24),
    "odd-row-stride": lambda draw: draw(2, 18, 4, 25)[..., :24],
    "one-sample-for-all": lambda draw: draw(1, 18, 4, 24).expand(2, -1, -1, -1),
    "one-token-for-all": lambda draw: draw(2, 1, 4, 24).expand(-1, 18, -1, -1),
    "one-head-for-all": lambda draw: draw(2, 18, 1, 24).expand(-1, -1, 4, -1),
    "one-number-for-all": lambda draw: draw(1, 1, 1, 1).expand(2, 18, 4, 24),
}


@each_shape
def test_in_place_equals_complex_multiplication(draw, shape) -> None:
    batch, tokens, heads, kv_heads, width = shape
    q, k = draw(batch, tokens, heads, width), draw(batch, tokens, kv_heads, width)
    cos, sin = draw.angles(tokens, width // 2)
    expected = [complex_rotation(x, cos, sin) for x in (q, k)]
    rotary.rotate_(q, k, cos, sin)
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.endswith("-for-all")])
def test_in_place_writes_to_nothing_else(draw, name) -> None:
    q, k = LAYOUTS[name](draw), draw(2, 18, 2, 24)
    cos, sin = draw.angles(18, 12)
    whole = q.as_strided((q.untyped_storage().nbytes() // 4,), (1,), 0)
    expected = whole.clone()
    seen = expected.as_strided(q.shape, q.stride(), q.storage_offset())
    seen.copy_(complex_rotation(q, cos, sin))
    rotary.rotate_(q, k, cos, sin)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(draw, layout) -> None:
    x, contiguous = layout(draw), draw(2, 18, 2, 24)
    cos, sin = draw.angles(18, 12)
    check(x, contiguous, cos, sin)
    check(contiguous, x, cos.T.contiguous().T, torch.cat([sin, sin], dim=-1)[:, :12])


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(37, 4, 2, 24), (5, 9, 1, 72)]
)
def test_gradients_equal_float64_autograd(draw, tokens, heads, kv_heads, head_dim) -> None:
    inputs = [draw(2, tokens, count, head_dim).requires_grad_() for count in (heads, kv_heads)]
    cos, sin = draw.angles(2, tokens, head_dim // 2)
    outputs = rotary.rotate(*inputs, cos, sin)
    cotangents = [draw(*output.shape) for output in outputs]
    ours = torch.autograd.grad(outputs, inputs, cotangents)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = [complex_rotation(x, cos, sin) for x in doubles]
    expected = torch.autograd.grad(exact, doubles, [c.double() for c in cotangents])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-6, rtol=0)


def test_gradient_with_stride_zero_and_to_one_input_alone(draw) -> None:
    q, k = draw(2, 18, 4, 24).requires_grad_(), draw(2, 18, 2, 24)
    cos, sin = draw.angles(18, 12)
    rotated, other = rotary.rotate(q, k, cos, sin)
    (gradient,) = torch.autograd.grad(rotated.sum() + other.sum(), q)  # an expanded gradient
    expected = complex_rotation(torch.ones_like(q), cos, -sin)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=0)


def test_gradient_of_the_gradient_rotates_forward(draw) -> None:
    q, k = draw(5, 2, 24).requires_grad_(), draw(5, 1, 24)
    cos, sin = draw.angles(5, 12)
    cotangent = draw(5, 2, 24).requires_grad_()
    direction = draw(5, 2, 24)
    (first,) = torch.autograd.grad(
        rotary.rotate(q, k, cos, sin)[0], q, cotangent, create_graph=True
    )
    (second,) = torch.autograd.grad(first, cotangent, direction)
    expected = complex_rotation(direction, cos, sin)
    torch.testing.assert_close(second.double(), expected, atol=1e-6, rtol=0)


def test_rotating_back_restores_and_keeps_lengths(draw) -> None:
    q, k = draw(1, 33, 4, 72), draw(1, 33, 2, 72)
    cos, sin = draw.angles(33, 36)
    rotated = rotary.rotate(q, k, cos, sin)
    torch.testing.assert_close(rotated[0].norm(dim=-1), q.norm(dim=-1))
    for back, x in zip(rotary.rotate(*rotated, cos, -sin), (q, k), strict=True):
        torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "packed"])
def test_operator_passes_opcheck(draw, grad, layout) -> None:
    shape = {"contiguous": (2, 5, 3, 24), "transposed": (2, 3, 5, 24), "packed": (5, 3, 24)}[layout]
    q = draw(*shape).requires_grad_(grad)
    k = draw(*shape).requires_grad_(grad)
    if layout == "transposed":
        q, k = q.detach().transpose(1, 2), k.detach().transpose(1, 2)
        q.requires_grad_(grad)
    operator = torch.ops.nextdit_kernels.rotate_qk.default
    torch.library.opcheck(operator, (q, k, *draw.angles(5, 12), False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(draw, backend, dynamic) -> None:
    compiled = torch.compile(rotary.rotate, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (5, 9):
        q, k = draw(2, tokens, 3, 24).requires_grad_(), draw(2, tokens, 1, 24)
        tables = draw.angles(tokens, 12)
        ours, expected = compiled(q, k, *tables), rotary.rotate(q, k, *tables)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        mine, theirs = (torch.autograd.grad(out[0].square().sum(), q) for out in (ours, expected))
        assert torch.equal(*mine, *theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 6, 1, 8)}, "do not fit"),
        ({"k": (2, 5, 1, 10)}, "do not fit"),
        ({"k": (5, 1, 8)}, "do not fit"),
        ({"q": (8,), "k": (8,)}, "do not fit"),
        ({"cos": (6, 4), "sin": (6, 4)}, "do not fit"),
        ({"cos": (5, 3), "sin": (5, 3)}, "do not fit"),
        ({"sin": (1, 5, 4)}, "do not fit"),
        ({"cos": (3, 5, 4), "sin": (3, 5, 4)}, "do not fit"),
        ({"q": (5, 1, 8), "k": (5, 1, 8), "cos": (1, 5, 4), "sin": (1, 5, 4)}, "do not fit"),
        ({"q": (2, 5, 1, 258), "k": (2, 5, 1, 258), "cos": (5, 129), "sin": (5, 129)}, "up to 256"),
    ],
)
def test_shapes_that_would_be_misread_raise(draw, change, message) -> None:
    shapes = {"q": (2, 5, 1, 8), "k": (2, 5, 1, 8), "cos": (5, 4), "sin": (5, 4)} | change
    with pytest.raises(ValueError, match=message):
        rotary.rotate(*(draw(*shape) for shape in shapes.values()))


def test_tables_must_be_float32_without_gradient(draw) -> None:
    q, (cos, sin) = draw(5, 1, 8), draw.angles(5, 4)
    with pytest.raises(ValueError, match=r"expected float32 on (cpu|cuda)"):
        rotary.rotate(q, q, cos.double(), sin.double())
    cos.requires_grad_()
    with pytest.raises(ValueError, match="detach them"):
        rotary.rotate(q, q, cos, sin)
    with torch.no_grad():
        check(q, q, cos, sin)
