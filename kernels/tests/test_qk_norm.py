"""The kernels against PyTorch's norms and a rotation in float64, in the interpreter or on a GPU."""

import math

import pytest
import torch
from torch.nn import functional

from nextdit_kernels import qk_norm, rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {  # of one number, relative; Triton's interpreter truncates to bfloat16
    torch.float32: 4e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7,
}
SHAPES = {  # batch, tokens, heads, kv_heads, head_dim
    "one-head-one-token": (1, 1, 1, 1, 8),
    "one-pair": (1, 3, 2, 1, 2),
    "odd-length": (2, 7, 3, 3, 24),
    "lumina": (1, 3, 32, 8, 72),
    "lumina-two-samples": (2, 6, 32, 8, 72),
    "more-key-heads": (2, 3, 2, 9, 96),
    "two-tiles": (1, 5, 9, 1, 64),
    "widest-head": (1, 5, 2, 1, 256),
    "no-tokens": (2, 0, 4, 2, 72),
    "no-samples": (0, 5, 4, 2, 72),
    "no-key-heads": (1, 5, 4, 0, 24),
}
LAYOUTS = {
    "heads-before-tokens": lambda draw: draw(2, 4, 9, 24).transpose(1, 2),
    "slice-of-a-projection": lambda draw: draw(2, 9, 3, 4, 24)[:, :, 1],
    "every-other-token": lambda draw: draw(2, 18, 4, 24)[:, ::2],
    "every-other-channel": lambda draw: draw(2, 9, 4, 48)[..., ::2],
    "channels-before-heads": lambda draw: draw(2, 9, 24, 4).transpose(2, 3),
    "shifted-by-one": lambda draw: draw(2 * 9 * 4 * 24 + 1)[1:].view(2, 9, 4, 24),
    "odd-row-stride": lambda draw: draw(2, 9, 4, 25)[..., :24],
    "one-sample-for-all": lambda draw: draw(1, 9, 4, 24).expand(2, -1, -1, -1),
    "one-token-for-all": lambda draw: draw(2, 1, 4, 24).expand(-1, 9, -1, -1),
    "one-head-for-all": lambda draw: draw(2, 9, 1, 24).expand(-1, -1, 4, -1),
}
each_norm = pytest.mark.parametrize("norm", ["layer", "rms"])
each_over = pytest.mark.parametrize("over", ["hidden", "head"])


@pytest.fixture
def draw():
    """Random tensors, normal around 1/2, and the cosine and sine of random angles."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).add(0.5).to(DEVICE, dtype)

    def angles(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = normal(*shape).double() * 100
        return angle.cos().float(), angle.sin().float()

    normal.angles = angles
    return normal


@pytest.fixture
def parameters(draw):
    """Weights and biases, by keyword, as `norm_rotate` takes them."""

    def build(q, k, norm, over, dtype=torch.float32) -> dict[str, torch.Tensor]:
        names = ("q_weight", "k_weight") + (("q_bias", "k_bias") if norm == "layer" else ())
        sizes = {"q": q.shape[-2:], "k": k.shape[-2:]}
        sizes = {name: math.prod(size) for name, size in sizes.items()}
        return {
            name: draw(sizes[name[0]] if over == "hidden" else q.shape[-1], dtype=dtype)
            for name in names
        }

    return build


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill outputs with NaN before the kernels run, so that what they leave unwritten shows."""

    def poison(function):
        def build(*arguments):
            made = function(*arguments)
            for x in made if isinstance(made, tuple) else (made,):
                x.fill_(math.nan)
            return made

        return build

    for name in ("_outputs", "_statistics", "_sums"):
        monkeypatch.setattr(qk_norm, name, poison(getattr(qk_norm, name)))


def exact(x, cos, sin, weight, bias, norm, over, eps) -> torch.Tensor:
    """Normalise with PyTorch, then rotate by complex multiplication."""
    if x.numel() == 0:
        return x * 1
    groups = x.flatten(-2) if over == "hidden" else x
    if norm == "layer":
        groups = functional.layer_norm(groups, groups.shape[-1:], weight, bias, eps)
    else:
        groups = functional.rms_norm(groups, groups.shape[-1:], weight, eps)
    pairs = groups.reshape(*x.shape[:-1], -1, 2)
    turn = torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(-2)


def check(q, k, cos, sin, norm, over, given, grads, eps=1e-5) -> None:
    """Compare values and all gradients with those in float64."""
    tensors = {"q": q, "k": k, **given}
    before = [x.clone() for x in tensors.values()]
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    weights = {"q_weight": None, "k_weight": None} | {name: leaves[name] for name in given}
    words = {"norm": norm, "over": over, "eps": eps}
    outputs = qk_norm.norm_rotate(leaves["q"], leaves["k"], cos, sin, **weights, **words)
    ours = torch.autograd.grad(outputs, leaves.values(), grads)
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected = [
        exact(
            doubles[name],
            cos,
            sin,
            doubles.get(f"{name}_weight"),
            doubles.get(f"{name}_bias"),
            **words,
        )
        for name in ("q", "k")
    ]
    theirs = torch.autograd.grad(
        expected, doubles.values(), [x.double() for x in grads], materialize_grads=True
    )
    like = [q, k, *tensors.values()]
    for mine, other, x in zip((*outputs, *ours), (*expected, *theirs), like, strict=True):
        assert mine.dtype == x.dtype
        assert mine.shape == x.shape
        assert mine.is_contiguous()
        # Sums over many terms are rounded relative to their size.
        largest = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(
            mine.double(), other, atol=4e-6 * max(1.0, largest), rtol=ROUNDING[x.dtype] * 1.01
        )
    assert all(torch.equal(x, old) for x, old in zip(tensors.values(), before, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@each_norm
@each_over
def test_values_and_gradients_equal_float64(draw, parameters, shape, norm, over) -> None:
    batch, tokens, heads, kv_heads, width = shape
    q, k = draw(batch, tokens, heads, width), draw(batch, tokens, kv_heads, width)
    grads = draw(*q.shape), draw(*k.shape)
    tables = draw.angles(tokens, width // 2)
    check(q, k, *tables, norm, over, parameters(q, k, norm, over), grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["float32", "same"])
@each_norm
@each_over
def test_sixteen_bits_are_rounded_once(draw, parameters, dtype, weights, norm, over) -> None:
    q, k = draw(1, 5, 5, 72, dtype=dtype), draw(1, 5, 2, 72, dtype=dtype)
    grads = draw(*q.shape, dtype=dtype), draw(*k.shape, dtype=dtype)
    given = parameters(q, k, norm, over, torch.float32 if weights == "float32" else dtype)
    check(q, k, *draw.angles(5, 36), norm, over, given, grads)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(draw, parameters, layout) -> None:
    x, y, z = layout(draw), draw(2, 9, 2, 24), draw(2, 9, 4, 24)
    cos, sin = draw.angles(9, 12)
    check(x, y, cos, sin, "layer", "hidden", parameters(x, y, "layer", "hidden"), (z, y))
    given = parameters(y, x, "rms", "head")
    check(y, x, cos.T.contiguous().T, sin, "rms", "head", given, (y, z))
    check(y, z, cos, sin, "rms", "head", given, (y, x))


def test_strided_parameters(draw, parameters) -> None:
    q, k = draw(5, 3, 8), draw(5, 1, 8)
    given = {
        name: draw(2 * x.numel())[::2] for name, x in parameters(q, k, "layer", "head").items()
    }
    check(q, k, *draw.angles(5, 4), "layer", "head", given, (draw(5, 3, 8), draw(5, 1, 8)))


@pytest.mark.parametrize("given", [(), ("q_weight",), ("k_bias",), ("k_weight", "q_bias")])
@each_over
def test_any_of_the_parameters_may_be_missing(draw, parameters, given, over) -> None:
    q, k = draw(7, 4, 24), draw(7, 2, 24)
    tables = draw.angles(7, 12)
    some = {name: parameters(q, k, "layer", over)[name] for name in given}
    check(q, k, *tables, "layer", over, some, (draw(*q.shape), draw(*k.shape)))


@pytest.mark.parametrize("batch", [1, 3])
def test_angles_of_each_sample_or_of_all(draw, batch) -> None:
    q, k = draw(3, 5, 4, 24), draw(3, 5, 2, 24)
    cos, sin = draw.angles(batch, 5, 12)
    grads = draw(*q.shape), draw(*k.shape)
    check(q, k, cos, sin, "rms", "head", {}, grads)
    check(q, k, cos[:1].expand(3, -1, -1), sin[:1].expand(3, -1, -1), "rms", "hidden", {}, grads)


def test_a_large_mean_costs_no_precision(draw) -> None:
    q, k = draw(5, 4, 24) + 300, draw(5, 2, 24) - 300
    tables, weights = draw.angles(5, 12), {"q_weight": None, "k_weight": None}
    for x, ours in zip((q, k), qk_norm.norm_rotate(q, k, *tables, **weights), strict=True):
        expected = exact(x.double(), *tables, None, None, "layer", "hidden", 1e-5)
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)


def test_eps_keeps_zeros_finite(draw) -> None:
    q, k = torch.zeros(3, 2, 8, device=DEVICE), torch.zeros(3, 1, 8, device=DEVICE)
    grads = draw(*q.shape), draw(*k.shape)
    for norm in ("layer", "rms"):
        check(q, k, *draw.angles(3, 4), norm, "head", {}, grads, eps=0.5)


def test_equals_the_norm_followed_by_rotate(draw, parameters) -> None:
    q, k = draw(2, 5, 4, 24), draw(2, 5, 2, 24)
    tables, given = draw.angles(5, 12), parameters(q, k, "layer", "hidden")
    normal = [
        functional.layer_norm(
            x.flatten(-2), (x.shape[-2] * 24,), given[f"{name}_weight"], given[f"{name}_bias"]
        ).view_as(x)
        for name, x in {"q": q, "k": k}.items()
    ]
    expected = rotary.rotate(*normal, *tables)
    for mine, other in zip(qk_norm.norm_rotate(q, k, *tables, **given), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=4e-6, rtol=0)


@pytest.mark.parametrize("name", ["q", "k", "q_weight", "k_bias"])
def test_gradient_to_one_input_alone(draw, parameters, name) -> None:
    q, k = draw(2, 5, 4, 24), draw(2, 5, 2, 24)
    cos, sin = draw.angles(5, 12)
    given = {"q": q, "k": k, **parameters(q, k, "layer", "hidden")}
    alone = given[name].double().requires_grad_()
    doubles = {key: x.double() for key, x in given.items()} | {name: alone}
    expected = sum(
        exact(
            doubles[x],
            cos,
            sin,
            doubles[f"{x}_weight"],
            doubles[f"{x}_bias"],
            "layer",
            "hidden",
            1e-5,
        ).sum()
        for x in ("q", "k")
    )
    given[name].requires_grad_()
    rotated, other = qk_norm.norm_rotate(cos=cos, sin=sin, **given)
    (ours,) = torch.autograd.grad(rotated.sum() + other.sum(), given[name])  # expanded gradients
    (theirs,) = torch.autograd.grad(expected, alone)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)


def test_sums_are_made_only_where_asked(draw, parameters, monkeypatch) -> None:
    q, k = draw(2, 5, 4, 24).requires_grad_(), draw(2, 5, 2, 24)
    given = parameters(q, k, "layer", "hidden")
    given["k_weight"].requires_grad_()
    made = []
    sums = qk_norm._sums
    monkeypatch.setattr(qk_norm, "_sums", lambda x, *shape: made.append(shape) or sums(x, *shape))
    qk_norm.norm_rotate(q, k, *draw.angles(5, 12), **given)[1].sum().backward()
    assert [shape[-1] for shape in made if shape != (0,)] == [2 * 24]


def test_an_output_that_nobody_used(draw) -> None:
    q, k = draw(5, 4, 24).requires_grad_(), draw(5, 2, 24).requires_grad_()
    rotated, _ = qk_norm.norm_rotate(q, k, *draw.angles(5, 12), q_weight=None, k_weight=None)
    rotated.square().sum().backward()
    assert q.grad is not None
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_gradients_do_not_change_from_run_to_run(draw, parameters) -> None:
    q, k = draw(2, 9, 4, 24), draw(2, 9, 2, 24)
    tables, given = draw.angles(9, 12), parameters(q, k, "layer", "hidden")
    for x in given.values():
        x.requires_grad_()
    first, second = (
        torch.autograd.grad(
            sum(x.square().sum() for x in qk_norm.norm_rotate(q, k, *tables, **given)),
            given.values(),
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivative_is_refused(draw) -> None:
    q, k = draw(5, 2, 24).requires_grad_(), draw(5, 1, 24)
    rotated, _ = qk_norm.norm_rotate(q, k, *draw.angles(5, 12), q_weight=None, k_weight=None)
    (first,) = torch.autograd.grad(rotated.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize(("norm", "numbers"), [("layer", 2), ("rms", 1)])
@pytest.mark.parametrize(("over", "groups"), [("hidden", 1), ("head", 4)])
def test_keeps_its_inputs_and_statistics_alone(
    draw, parameters, norm, numbers, over, groups
) -> None:
    q, k = draw(5, 4, 24).requires_grad_(), draw(5, 4, 24).requires_grad_()
    cos, sin = draw.angles(5, 12)
    given = parameters(q, k, norm, over)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        qk_norm.norm_rotate(q, k, cos, sin, **given, norm=norm, over=over)
    inputs = {x.data_ptr() for x in (q, k, cos, sin, given["q_weight"], given["k_weight"])}
    assert inputs <= {x.data_ptr() for x in kept}
    others = [x for x in kept if x.data_ptr() not in inputs]
    assert [(x.dtype, x.numel()) for x in others] == [(torch.float32, 2 * numbers * groups * 5)]


@pytest.mark.parametrize(
    ("layout", "over", "grad"),
    [
        ("dense", "hidden", True),
        ("packed", "head", True),
        ("heads-before-tokens", "head", False),
    ],
)
def test_operators_pass_opcheck(draw, parameters, grad, layout, over) -> None:
    q, k = draw(2, 5, 3, 24), draw(2, 5, 3, 24)
    if layout == "packed":
        q, k = q[0], k[0]
    elif layout == "heads-before-tokens":
        q, k = draw(2, 3, 5, 24).transpose(1, 2), draw(2, 3, 5, 24).transpose(1, 2)
    norm = "layer" if over == "hidden" else "rms"
    given = parameters(q, k, norm, over)
    q_weight, k_weight, q_bias, k_bias = (
        given[name].requires_grad_(grad) if name in given else None
        for name in ("q_weight", "k_weight", "q_bias", "k_bias")
    )
    q, k = q.detach().requires_grad_(grad), k.detach().requires_grad_(grad)
    cos, sin = draw.angles(5, 12)
    operators = torch.ops.nextdit_kernels
    arguments = (q, k, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, over, 1e-6)
    torch.library.opcheck(operators.norm_rotate.default, arguments)
    with torch.no_grad():
        *outputs, stats = operators.norm_rotate.default(*arguments)
        weights = [None if x is None else x.detach() for x in (q_weight, k_weight)]
        inputs = (*outputs, q.detach(), k.detach(), stats, cos, sin, *weights)
    wanted = [True, norm == "layer", False, norm == "layer"]
    backward = operators.norm_rotate_backward.default
    torch.library.opcheck(backward, (*inputs, norm, over, wanted))


@pytest.mark.parametrize(("dynamic", "over"), [(False, "hidden"), (True, "head")])
def test_compiles_without_graph_breaks(draw, parameters, dynamic, over) -> None:
    def run(q, k, cos, sin, given):
        return qk_norm.norm_rotate(q, k, cos, sin, **given, over=over)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 9):
        q, k = draw(2, tokens, 3, 24).requires_grad_(), draw(2, tokens, 1, 24)
        given = parameters(q, k, "layer", over)
        given["q_weight"].requires_grad_()
        given["k_bias"].requires_grad_()
        tables = draw.angles(tokens, 12)
        ours, expected = compiled(q, k, *tables, given), run(q, k, *tables, given)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        leaves = [q, given["q_weight"], given["k_bias"]]
        mine, theirs = (
            torch.autograd.grad(x[0].square().sum() + x[1].sum(), leaves) for x in (ours, expected)
        )
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 6, 1, 8)}, "do not fit"),
        ({"cos": (6, 4), "sin": (6, 4)}, "do not fit"),
        ({"q_weight": (8,)}, r"q_weight \(8,\) does not fit; expected \[24\] for over='hidden'"),
        ({"k_bias": (1, 8)}, r"k_bias \(1, 8\) does not fit; expected \[8\]"),
        ({"over": "head"}, r"q_weight \(24,\) does not fit; expected \[8\] for over='head'"),
        ({"over": "tokens"}, "expected norm 'layer' or 'rms', and over 'hidden' or 'head'"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"norm": "rms"}, "q_bias is given, but norm='rms' has no bias"),
    ],
)
def test_what_would_be_misread_raises(draw, change, message) -> None:
    shapes = {"q": (2, 5, 3, 8), "k": (2, 5, 1, 8), "cos": (5, 4), "sin": (5, 4)}
    shapes |= {"q_weight": (24,), "q_bias": (24,), "k_weight": (8,), "k_bias": (8,)} | change
    given = {name: x if isinstance(x, str) else draw(*x) for name, x in shapes.items()}
    with pytest.raises(ValueError, match=message):
        qk_norm.norm_rotate(**given)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((5, 2, 258), torch.float32, "head_dim is 258; the kernel takes even ones up to 256"),
        ((5, 2, 8), torch.float64, "one of bfloat16, float16, float32"),
        ((1, 33, 256), torch.float32, "q has 8448 channels in a token; the kernel takes 8192"),
    ],
)
def test_refusals_say_what_is_served(draw, shape, dtype, message) -> None:
    q = draw(*shape, dtype=dtype)
    tables = draw.angles(shape[0], shape[2] // 2)
    with pytest.raises(ValueError, match=message):
        qk_norm.norm_rotate(q, q, *tables, q_weight=None, k_weight=None)


def test_wide_tokens_are_served_over_heads(draw) -> None:
    q = draw(1, 33, 256)
    assert qk_norm.why_not(q, q, over="head") is None
    check(q, q[:, :1], *draw.angles(1, 128), "rms", "head", {}, (q, q[:, :1]))


def test_needs_one_served_device() -> None:
    x, meta = torch.zeros(5, 2, 8, device=DEVICE), torch.zeros(5, 2, 8, device="meta")
    assert "needs one device" in qk_norm.why_not(x, meta)
    assert "q is on meta; the kernel needs CUDA" in qk_norm.why_not(meta, meta)


def test_parameters_and_tables_must_fit_in_dtype(draw) -> None:
    q, (cos, sin) = draw(5, 1, 8, dtype=torch.float16), draw.angles(5, 4)
    weights = {"q_weight": draw(8, dtype=torch.bfloat16), "k_weight": None}
    with pytest.raises(ValueError, match=r"q_weight is torch.bfloat16 .* float32 or torch.float16"):
        qk_norm.norm_rotate(q, q, cos, sin, **weights)
    weights["q_weight"] = None
    with pytest.raises(ValueError, match=r"expected float32 on (cpu|cuda)"):
        qk_norm.norm_rotate(q, q, cos.double(), sin.double(), **weights)
    cos.requires_grad_()
    with pytest.raises(ValueError, match="detach them"):
        qk_norm.norm_rotate(q, q, cos, sin, **weights)
