"""Attention against PyTorch's in float64, with autograd, in the interpreter or on a GPU."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nextdit_kernels import attention_backward, attention_forward
from nextdit_kernels import softmax_attention as ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}  # of numbers around 1
SHAPES = {  # batch, tokens, keys, heads, kv_heads, head_dim
    "one-of-each": (1, 1, 1, 1, 1, 8),
    "odd-lengths": (2, 37, 29, 3, 3, 24),
    "tail-of-8-from-32": (1, 9, 5, 2, 1, 40),
    "grouped": (1, 33, 33, 6, 2, 64),
    "lumina": (1, 19, 19, 8, 2, 72),
    "two-blocks": (1, 130, 100, 2, 1, 72),
    "tail-of-16": (1, 17, 64, 2, 2, 80),
    "tail-of-32": (2, 5, 7, 2, 1, 96),
    "padded": (1, 7, 5, 2, 1, 104),
    "wide": (1, 64, 33, 2, 1, 128),
    "widest": (1, 9, 12, 2, 1, 256),
    "one-query": (2, 1, 45, 4, 2, 72),
    "one-key": (2, 45, 1, 4, 2, 72),
    "no-tokens": (2, 0, 5, 4, 2, 72),
    "no-keys": (2, 5, 0, 4, 2, 72),
    "no-samples": (0, 5, 5, 4, 2, 72),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
LAYOUTS = {  # of [2, 9, 4, 24]
    "heads-before-tokens": lambda draw: draw(2, 4, 9, 24).transpose(1, 2),
    "third-of-a-projection": lambda draw: draw(2, 9, 3, 4, 24)[:, :, 1],
    "every-other-token": lambda draw: draw(2, 18, 4, 24)[:, ::2],
    "every-other-channel": lambda draw: draw(2, 9, 4, 48)[..., ::2],
    "odd-row-stride": lambda draw: draw(2, 9, 4, 25)[..., :24],
    "shifted-by-one": lambda draw: draw(2 * 9 * 4 * 24 + 1)[1:].view(2, 9, 4, 24),
    "one-head-for-all": lambda draw: draw(2, 9, 1, 24).expand(-1, -1, 4, -1),
    "one-number-for-all": lambda draw: draw(1, 1, 1, 1).expand(2, 9, 4, 24),
}
LENGTHS = {
    "one": ((37,), (37,)),
    "self": ((5, 32, 1, 9), (5, 32, 1, 9)),
    "to-texts": ((40, 3, 20), (7, 12, 1)),
    "without-keys": ((6, 5, 4), (3, 0, 2)),
    "without-queries": ((0, 6, 0, 0, 5, 0), (3, 2, 0, 4, 1, 2)),
    "nothing": ((0, 0), (0, 0)),
    "no-sample": ((), ()),
}
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


@pytest.fixture
def draw():
    """Random normal tensors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill outputs with NaN before the kernels run, so that what they leave unwritten shows."""
    for name in ("_like", "_float32"):
        empty = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *x, empty=empty: empty(*x).fill_(math.nan))


@pytest.fixture(autouse=True)
def sizes(monkeypatch, request):
    """Give the kernels small blocks of queries and keys: (32, 16), or the test's parameter."""
    queries, keys = getattr(request, "param", (32, 16))

    def blocks(*case: object) -> dict[str, int]:
        return attention_forward.sizes(queries, keys, 4, 1)

    monkeypatch.setattr(attention_forward, "blocks", blocks)
    monkeypatch.setattr(attention_backward, "query_blocks", blocks)
    monkeypatch.setattr(attention_backward, "key_blocks", blocks)
    ours._plan_forward.cache_clear()  # it holds the blocks of the test before


large = pytest.mark.parametrize("sizes", [(128, 128)], ids=["large"], indirect=True)


def dense(q, k, v, scale=None, key_mask=None):
    """Attend with PyTorch; scale broadcasts to [batch, heads]."""
    if k.shape[1] == 0:
        return q * 0
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q = q * torch.as_tensor(scale, dtype=torch.float64, device=q.device)[..., None, None]
    if key_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
    alive = key_mask.any(-1)[:, None, None, None]
    mask = key_mask[:, None, None] | ~alive
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return out.masked_fill(~alive, 0.0).transpose(1, 2)


def exact(q, k, v, *, lengths=None, key_lengths=None, scale=None, key_mask=None):
    """Attend sample by sample; scale [samples] or [samples, heads] where it is a tensor."""
    if isinstance(scale, torch.Tensor):
        scale = scale.double()
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif scale.ndim == 1:
            scale = scale[:, None]
    if q.ndim == 4:
        return dense(q, k, v, scale, key_mask)
    key_lengths = lengths if key_lengths is None else key_lengths
    parts = [q * 0]
    samples = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    for i, sample in enumerate(samples):
        own = scale[i : i + 1] if getattr(scale, "ndim", 0) else scale
        parts.append(dense(*(x[None] for x in sample), own)[0])
    return torch.cat(parts)[q.shape[0] :]


def compare(function, reference, inputs, grad, **options) -> None:
    """Compare value and gradients of a function with those of its reference in float64."""
    before = [x.clone() for x in inputs]
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves, **options)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*doubles, **options)
    assert result.dtype == inputs[0].dtype
    assert result.is_contiguous()
    mine = (result, *torch.autograd.grad(result, leaves, grad))
    theirs = torch.autograd.grad(expected, doubles, grad.double(), allow_unused=True)
    for x, y in zip(mine, (expected, *theirs), strict=True):
        y = torch.zeros_like(x, dtype=torch.float64) if y is None else y
        assert x.shape == y.shape
        size = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        torch.testing.assert_close(x.double(), y, atol=TOLERANCE[x.dtype] * size, rtol=0)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


def check(q, k, v, grad=None, **options) -> None:
    compare(
        ours.attention, exact, (q, k, v), torch.ones_like(q) if grad is None else grad, **options
    )


def gated(q, k, v, gate, out, **options):
    return out + gate.tanh()[:, None] * exact(q, k, v, **options)


def check_gated(q, k, v, gate, out, grad, **options) -> None:
    compare(ours.gated_cross_attention, gated, (q, k, v, gate, out), grad, **options)


def drawn(draw, shape, dtype=torch.float32):
    """Draw q, k, v and a gradient."""
    batch, tokens, keys, heads, kv_heads, width = shape
    shapes = [(batch, tokens, heads, width), *[(batch, keys, kv_heads, width)] * 2]
    return [draw(*x, dtype=dtype) for x in (*shapes, shapes[0])]


@each_shape
@pytest.mark.parametrize("dtype", TOLERANCE)
@large
def test_equals_float64(draw, shape, dtype, sizes) -> None:
    check(*drawn(draw, shape, dtype))


@pytest.mark.parametrize("name", ["odd-lengths", "lumina", "tail-of-32", "one-query", "one-key"])
@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)], ids=str, indirect=True)
def test_equals_float64_over_many_blocks(draw, name, sizes) -> None:
    check(*drawn(draw, SHAPES[name]))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(draw, layout) -> None:
    x, *others = layout(draw), *(draw(2, 9, 4, 24) for _ in range(3))
    for i in range(4):
        check(*others[:i], x, *others[i:])


@each_lengths
def test_packed_samples_equal_samples_alone(draw, lengths) -> None:
    (tokens, keys), (lengths, key_lengths) = map(sum, lengths), lengths
    q, k, v, grad = (draw(n, h, 24) for n, h in ((tokens, 4), (keys, 2), (keys, 2), (tokens, 4)))
    check(q, k, v, grad, lengths=lengths, key_lengths=key_lengths)
    cu_seqlens, cu_key_seqlens = (ours._sums(x, q.device) for x in (lengths, key_lengths))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    host = ours.attention(*leaves, lengths=lengths, key_lengths=key_lengths)
    device = ours.attention(*leaves, cu_seqlens=cu_seqlens, cu_key_seqlens=cu_key_seqlens)
    assert torch.equal(host, device)
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            *(torch.autograd.grad(out, leaves, grad) for out in (host, device)), strict=True
        )
    )


def test_keys_have_the_lengths_of_the_queries_where_they_have_none(draw) -> None:
    q, k, v = draw(9, 2, 24), draw(9, 2, 24), draw(9, 2, 24)
    check(q, k, v, lengths=(4, 5))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    packed = ours.attention(q, k, v, lengths=(4, 5))
    assert torch.equal(ours.attention(q, k, v, cu_seqlens=cu_seqlens), packed)


def test_packed_without_lengths_is_one_sample(draw) -> None:
    q, k, v = draw(7, 4, 24), draw(5, 2, 24), draw(5, 2, 24)
    assert torch.equal(ours.attention(q, k, v), ours.attention(q[None], k[None], v[None])[0])


def test_lengths_go_to_the_device_once(draw) -> None:
    q = draw(11, 2, 24)
    ours._sums.cache_clear()
    for _ in range(3):
        ours.attention(q, q, q, lengths=[4, 7])
    assert ours._sums.cache_info().misses == 1


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("lengths", [(1, 15, 16, 17, 0, 31, 33), (64,), (0, 0, 1)])
def test_every_row_has_one_tile(block, lengths) -> None:
    starts = [*ours._sums(lengths, torch.device("cpu")).tolist()]
    owners = [s // block + i for i, s in enumerate(starts)]
    count = ours._tiles(len(lengths), 0, sum(lengths), block, True)
    assert owners[-1] <= count
    for length, (first, last) in zip(lengths, pairwise(owners), strict=True):
        assert (last - first) * block >= length


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("samples", [None, (), (1,), (2,), (2, 4)], ids=str)
def test_scale(draw, packed, samples) -> None:
    scale = -0.3 if samples is None else draw(1, *samples)[0] / 4
    q, k, v, grad = drawn(draw, (2, 9, 20, 4, 2, 24))
    if not packed:
        check(q, k, v, grad, scale=scale)
        return
    q, k, v, grad = (x.flatten(0, 1) for x in (q, k, v, grad))
    check(q, k, v, grad, lengths=(11, 7), key_lengths=(3, 37), scale=scale)


def test_scale_of_zero_is_the_mean(draw) -> None:
    q, k, v = draw(1, 5, 2, 24), draw(1, 20, 2, 24), draw(1, 20, 2, 24)
    mean = v.mean(1, keepdim=True).expand(-1, 5, -1, -1)
    torch.testing.assert_close(ours.attention(q, k, v, scale=0), mean)


@pytest.mark.parametrize("name", ["odd-lengths", "one-query", "no-keys"])
def test_masked_keys(draw, name) -> None:
    q, k, v, grad = drawn(draw, SHAPES[name])
    key_mask = draw(*k.shape[:2]) > 0
    key_mask[:, :20] = False  # a whole block
    check(q, k, v, grad, key_mask=key_mask)
    key_mask[0] = False  # a sample without keys
    check(q, k, v, grad, key_mask=key_mask)


# Of keys that are not there the interpreter computes 2^(0 - lse) before it drops them.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores_do_not_overflow(draw, size) -> None:
    q, k, v, grad = drawn(draw, (1, 20, 21, 2, 1, 24))
    check(q * size, k, v, grad * 1e-3)
    check(-q.abs() * size, k.abs(), v, grad * 1e-3)  # all scores far below 0


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_the_key_gradient_add_up(draw, monkeypatch, parts) -> None:
    monkeypatch.setattr(ours, "_parts", lambda *x: parts)
    check(*drawn(draw, (1, 70, 9, 4, 2, 24)))


def test_few_keys_make_many_parts() -> None:
    text = ours._Shape(4096, 256, 1, 4096, 32, 8)
    assert ours._parts(text, 2, 64, 132) == 8  # 128 programs for 132 processors
    assert ours._parts(text._replace(N=4096), 32, 64, 132) == 1
    assert ours._parts(text._replace(T=77, TOTAL=77), 2, 64, 132) == 1


def test_gradients_have_the_same_bits_every_time(draw) -> None:
    *inputs, grad = drawn(draw, (1, 70, 40, 4, 2, 24))
    leaves = [x.requires_grad_() for x in inputs]
    runs = [torch.autograd.grad(ours.attention(*leaves), leaves, grad) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_gradient_to_one_input_alone(draw) -> None:
    q, k, v = draw(1, 9, 2, 24), draw(1, 9, 2, 24), draw(1, 9, 2, 24).requires_grad_()
    (gradient,) = torch.autograd.grad(ours.attention(q, k, v).sum(), v)  # an expanded gradient
    double = v.detach().double().requires_grad_()
    expected = torch.autograd.grad(dense(q.double(), k.double(), double).sum(), double)[0]
    torch.testing.assert_close(gradient.double(), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("name", ["odd-lengths", "lumina", "tail-of-32", "no-keys", "no-tokens"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@large
def test_gated_equals_float64(draw, name, dtype, sizes) -> None:
    q, k, v, grad = drawn(draw, SHAPES[name], dtype)
    gate = torch.linspace(-2, 0, q.shape[2], dtype=dtype, device=DEVICE)
    check_gated(q, k, v, gate, draw(*q.shape, dtype=dtype), grad)


def test_gated_with_masked_text(draw) -> None:
    q, k, v, grad = drawn(draw, (2, 37, 29, 4, 2, 72))
    key_mask = torch.arange(29, device=DEVICE) < torch.tensor([[12], [0]], device=DEVICE)
    check_gated(q, k, v, draw(4), draw(*q.shape), grad, key_mask=key_mask)


def test_gated_with_packed_texts_and_a_scale_per_head(draw) -> None:
    q, k, v, grad = draw(50, 4, 24), draw(30, 2, 24), draw(30, 2, 24), draw(50, 4, 24)
    options = {"lengths": (30, 0, 20), "key_lengths": (12, 17, 1), "scale": draw(3, 4)}
    check_gated(q, k, v, draw(8)[::2], draw(50, 24, 4).mT, grad, **options)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.0999, 0.1001, 20.0, 100.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_gate_of_any_size(draw, size, sign) -> None:
    q, k, v, _ = drawn(draw, (1, 1, 1, 1, 1, 8))
    gate = torch.full((1,), sign * size, device=DEVICE)
    result = ours.gated_cross_attention(q, k, v, gate, torch.zeros_like(q))
    torch.testing.assert_close(result, v * gate.tanh(), rtol=1e-6, atol=0)


def test_gated_keeps_the_softmax_only_where_a_gradient_needs_it(draw) -> None:
    q, k, v, _ = drawn(draw, (1, 5, 5, 2, 1, 24))
    gate, out = draw(2), draw(*q.shape).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = ours.gated_cross_attention(q, k, v, gate, out)
    assert not any(x.shape == q.shape and x.data_ptr() != q.data_ptr() for x in kept)
    grad = draw(*q.shape)
    assert torch.equal(torch.autograd.grad(result, out, grad)[0], grad)


def test_second_derivatives_are_refused(draw) -> None:
    q, k, v, _ = drawn(draw, (1, 5, 5, 2, 1, 24))
    q.requires_grad_()
    for out in (
        ours.attention(q, k, v),
        ours.gated_cross_attention(q, k, v, draw(2), draw(*q.shape)),
    ):
        (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            first.sum().backward()


OPTIONS = {
    "dense": lambda draw: ((2, 5), (2, 7), {}),
    "masked-and-scaled": lambda draw: (
        (2, 5),
        (2, 7),
        {"key_mask": draw(2, 7) > 0, "scale": draw(2)},
    ),
    "packed": lambda draw: ((6,), (7,), {"lengths": (4, 2), "key_lengths": (3, 4)}),
    "on-the-device": lambda draw: (
        (6,),
        (6,),
        {"cu_seqlens": torch.tensor([0, 4, 6], dtype=torch.int32, device=DEVICE), "scale": 0.3},
    ),
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.mark.parametrize(
    ("name", "grad"),
    [("dense", False), ("masked-and-scaled", True), ("packed", True), ("on-the-device", False)],
)
def test_operators_pass_opcheck(draw, name, grad, monkeypatch) -> None:
    rows, key_rows, options = OPTIONS[name](draw)
    q, out = (draw(*rows, 4, 24).requires_grad_(grad) for _ in range(2))
    k, v = (draw(*key_rows, 2, 24).requires_grad_(grad) for _ in range(2))
    calls = []
    for name in ("_attention", "_gated_attention", "_attention_backward"):
        call = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *x, c=call: calls.append((c.__name__, x)) or c(*x))
    ours.attention(q, k, v, **options)
    result = ours.gated_cross_attention(q, k, v, draw(4).requires_grad_(grad), out, **options)
    if grad:
        result.sum().backward()
    assert len(calls) == 2 + grad
    for name, arguments in calls:
        if name == "attention_backward":
            arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(getattr(torch.ops.nextdit_kernels, name).default, arguments)


@each_options
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(draw, options, dynamic) -> None:
    rows, key_rows, options = options(draw)

    def both(q, k, v, gate):
        return ours.gated_cross_attention(
            q, k, v, gate, ours.attention(q, k, v, **options), **options
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = [draw(*rows, 4, 24), draw(*key_rows, 2, 24), draw(*key_rows, 2, 24), draw(4)]
    inputs = [x.requires_grad_() for x in inputs]
    mine, theirs = compiled(*inputs), both(*inputs)
    assert torch.equal(mine, theirs)
    gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (mine, theirs)]
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.fixture
def counted():
    """Count the graphs that torch.compile makes of a function."""
    graphs = []

    def compiled(function):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, backend=backend), graphs

    yield compiled
    torch.compiler.reset()


def test_other_scales_and_resolutions_compile_few_graphs(draw, counted) -> None:
    compiled, graphs = counted(lambda q, scale: ours.attention(q, q, q, scale=scale))
    for step in range(5):
        q, scale = draw(1, 5 + step, 2, 24), 0.1 + 0.07 * step
        assert torch.equal(compiled(q, scale), ours.attention(q, q, q, scale=scale))
    assert len(graphs) <= 3  # the first, one for a changing scale and one for a changing length


def test_scale_on_the_device_and_lengths_compile_one_graph_more(draw, counted) -> None:
    compiled, graphs = counted(
        lambda q, scale, lengths: ours.attention(q, q, q, scale=scale, lengths=lengths)
    )
    for step in range(5):
        lengths, scale = (3 + step, 7), torch.full((1,), 0.1 * step, device=DEVICE)
        q = draw(sum(lengths), 2, 24)
        expected = ours.attention(q, q, q, scale=scale, lengths=lengths)
        assert torch.equal(compiled(q, scale, lengths), expected)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 24)}, "do not fit"),
        ({"k": (2, 7, 2, 16)}, "do not fit"),
        ({"k": (2, 7, 2, 16), "v": (2, 7, 2, 16)}, "of their batch and head_dim"),
        ({"k": (3, 7, 2, 24), "v": (3, 7, 2, 24)}, "of their batch and head_dim"),
        ({"v": (2, 6, 2, 24)}, "expected k and v of one shape"),
        ({"k": (2, 7, 3, 24), "v": (2, 7, 3, 24)}, "multiple of kv_heads"),
        ({"k": (2, 7, 0, 24), "v": (2, 7, 0, 24)}, "multiple of kv_heads"),
        ({"q": (2, 5, 4, 20), "k": (2, 7, 2, 20), "v": (2, 7, 2, 20)}, "multiples of 8 up to 256"),
        ({"q": (2, 5, 4, 264), "k": (2, 7, 2, 264), "v": (2, 7, 2, 264)}, "up to 256"),
        ({"key_mask": (2, 6)}, r"expected bool \(2, 7\)"),
        ({"scale": (3,)}, r"float32 \[1\], \[2\] or \[2, 4\]"),
        ({"scale": (2, 2)}, r"float32 \[1\], \[2\] or \[2, 4\]"),
    ],
)
def test_shapes_that_would_be_misread_raise(draw, change, message) -> None:
    shapes = {"q": (2, 5, 4, 24), "k": (2, 7, 2, 24), "v": (2, 7, 2, 24)} | change
    tensors = {name: draw(*shape) for name, shape in shapes.items()}
    if "key_mask" in tensors:
        tensors["key_mask"] = tensors["key_mask"] > 0
    with pytest.raises(ValueError, match=message):
        ours.attention(**tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (4, 4)}, "sum to the 9 packed tokens"),
        ({"lengths": (10, -1)}, "at least 0"),
        ({"lengths": (4, 5), "key_lengths": (2, 3, 4)}, "2 samples and the keys of 3"),
        ({"lengths": (4, 5), "key_lengths": (4, 4)}, "key_lengths are"),
        ({"lengths": (9,), "cu_seqlens": [0, 9]}, "say the same"),
        ({"key_lengths": (9,), "cu_key_seqlens": [0, 9]}, "say the same"),
        ({"cu_seqlens": [[0, 9]]}, "expected int32"),
        ({"key_mask": [[True] * 9]}, "key_mask is for dense"),
    ],
)
def test_lengths_that_do_not_fit_raise(draw, options, message) -> None:
    q = draw(9, 2, 24)
    for name in ("cu_seqlens", "cu_key_seqlens", "key_mask"):
        if name in options:
            dtype = torch.bool if name == "key_mask" else torch.int32
            options = options | {name: torch.tensor(options[name], dtype=dtype, device=DEVICE)}
    with pytest.raises(ValueError, match=message):
        ours.attention(q, q, q, **options)


def test_dense_tensors_take_no_lengths(draw) -> None:
    q = draw(1, 9, 2, 24)
    with pytest.raises(ValueError, match="which is dense"):
        ours.attention(q, q, q, lengths=(9,))


def test_scale_gets_no_gradient(draw) -> None:
    q, scale = draw(1, 9, 2, 24), draw(1).requires_grad_()
    with pytest.raises(ValueError, match="detach it"):
        ours.attention(q, q, q, scale=scale)
    with torch.no_grad():
        result = ours.attention(q, q, q, scale=scale)
    assert torch.equal(result, ours.attention(q, q, q, scale=scale.detach()))


@pytest.mark.parametrize(
    ("gate", "out", "message"),
    [
        (torch.zeros(3), torch.zeros(1, 9, 2, 24), r"gate is torch.float32 \(3,\)"),
        (torch.zeros(2).double(), torch.zeros(1, 9, 2, 24), "gate is torch.float64"),
        (torch.zeros(2), torch.zeros(1, 8, 2, 24), "expected it like q"),
        (torch.zeros(2), torch.zeros(1, 9, 2, 24).half(), "out is torch.float16"),
    ],
)
def test_gate_and_out_must_fit(draw, gate, out, message) -> None:
    q = draw(1, 9, 2, 24)
    with pytest.raises(ValueError, match=message):
        ours.gated_cross_attention(q, q, q, gate.to(DEVICE), out.to(DEVICE))


def test_needs_one_served_dtype_and_device(draw) -> None:
    x, meta = draw(9, 2, 24), torch.zeros(9, 2, 24, device="meta")
    assert ours.why_not(x, x, x) is None
    assert "one of bfloat16, float16, float32" in ours.why_not(x.double(), x.double(), x.double())
    assert "v torch.float16" in ours.why_not(x, x, x.half())
    assert "needs one device" in ours.why_not(x, x, meta)
    assert "the kernel needs CUDA" in ours.why_not(meta, meta, meta)
    with pytest.raises(ValueError, match=r"cannot attend with these tensors: q is torch\.float64"):
        ours.attention(x.double(), x.double(), x.double())
