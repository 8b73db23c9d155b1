"""What only a GPU can show of attention: bfloat16, large offsets, one compilation, no waiting."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nextdit_kernels import attention_backward, attention_forward, softmax_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with PyTorch, in the dtype of the inputs."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


@pytest.fixture
def draw():
    """Random normal tensors that require a gradient."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator, device="cuda").to(dtype)
        return x.requires_grad_()

    return normal


def compare(function, reference, inputs) -> None:
    """Compare value and gradients: at most twice the error of PyTorch in the same dtype."""

    def run(function, inputs):
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))

    grad = torch.randn_like(function(*inputs))
    exact = [x.detach().float().requires_grad_() for x in inputs]
    results = run(function, inputs), run(reference, inputs), run(reference, exact)
    for ours, theirs, expected in zip(*results, strict=True):
        error = (ours.float() - expected).abs().max()
        allowed = (theirs.float() - expected).abs().max()
        assert error <= 2 * allowed + 1e-5


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_pytorch(draw, head_dim, dtype) -> None:
    shapes = [(1, 1000, 8, head_dim), (1, 777, 2, head_dim), (1, 777, 2, head_dim)]
    compare(softmax_attention.attention, plain, [draw(*shape, dtype=dtype) for shape in shapes])


def test_lumina_at_4096_tokens(draw) -> None:
    shapes = [(1, 4096, 32, 72), (1, 4096, 8, 72), (1, 4096, 8, 72)]
    compare(softmax_attention.attention, plain, [draw(*shape) for shape in shapes])


@pytest.mark.parametrize("head_dim", [72, 128])
def test_float32_keeps_its_digits(draw, head_dim) -> None:
    q, k, v = (draw(1, 500, heads, head_dim, dtype=torch.float32) for heads in (4, 2, 2))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ours, exact = softmax_attention.attention(q, k, v), plain(*doubles)
    mine = (ours, *torch.autograd.grad(ours.sum(), (q, k, v)))
    theirs = (exact, *torch.autograd.grad(exact.sum(), doubles))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=1e-5)


def test_gated_cross_attention(draw) -> None:
    def gated(q, k, v, gate, out):
        return out + gate.tanh()[:, None] * plain(q, k, v)

    shapes = [(2, 4096, 32, 72), (2, 120, 8, 72), (2, 120, 8, 72), (32,), (2, 4096, 32, 72)]
    compare(softmax_attention.gated_cross_attention, gated, [draw(*shape) for shape in shapes])


def test_packed_samples_equal_samples_alone(draw) -> None:
    lengths = (1024, 1, 0, 4096, 77, 2000)
    q, k, v = (draw(sum(lengths), heads, 72) for heads in (8, 2, 2))
    grad = torch.randn_like(q)
    packed = softmax_attention.attention(q, k, v, lengths=lengths)
    gradients = torch.autograd.grad(packed, (q, k, v), grad)
    samples = zip(*(x.split(lengths) for x in (q, k, v, grad, packed, *gradients)), strict=True)
    for *inputs, own_grad, out, mine_q, mine_k, mine_v in samples:
        inputs = [x.detach()[None].requires_grad_() for x in inputs]
        alone = softmax_attention.attention(*inputs)
        theirs = torch.autograd.grad(alone, inputs, own_grad[None])
        for x, y in zip((out, mine_q, mine_k, mine_v), (alone, *theirs), strict=True):
            # The key gradient of a short sample alone may be added in other parts.
            torch.testing.assert_close(x, y[0], atol=1e-2, rtol=1e-2)


def test_offsets_beyond_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    heads, tokens = 32, 2**31 // (32 * 72) + 1000
    q = torch.randn(tokens, heads, 72, device="cuda", dtype=torch.float16).requires_grad_()
    lengths = (tokens - 500, 500)
    keys = torch.randn(300, 1, 72, device="cuda", dtype=torch.float16)
    out = softmax_attention.attention(q, keys, keys, lengths=lengths, key_lengths=(100, 200))
    grad = torch.ones(1, 1, 1, device="cuda", dtype=torch.float16).expand_as(out)
    (gradient,) = torch.autograd.grad(out, q, grad)
    last = q.detach()[None, -500:].float().requires_grad_()
    own = keys[None, 100:].float()
    expected = plain(last, own, own)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(out[-500:].float(), expected[0], atol=4e-3, rtol=0)
    torch.testing.assert_close(gradient[-500:].float(), expected_gradient[0], atol=4e-3, rtol=4e-3)


def test_other_lengths_and_scales_do_not_compile_again(draw) -> None:
    kernels = (
        attention_forward.attention_kernel,
        attention_backward.query_gradient_kernel,
        attention_backward.key_gradient_kernel,
    )
    if not hasattr(kernels[0], "device_caches"):
        pytest.skip("Triton does not show its cache of compiled kernels here")
    device = torch.cuda.current_device()
    counts = []
    for step, lengths in enumerate([(256, 100), (1, 1), (77, 3, 900), (1024,), (0, 1023)]):
        q, k, v = (draw(sum(lengths), heads, 72) for heads in (8, 2, 2))
        out = softmax_attention.attention(q, k, v, lengths=lengths, scale=0.1 + step)
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        counts.append([len(kernel.device_caches[device][0]) for kernel in kernels])
    forward, query, key = zip(*counts, strict=True)
    assert len({*forward}) == len({*query}) == 1
    assert max(key) - min(key) <= 1  # with parts to be added up, and without


def test_lengths_on_the_device_are_not_waited_for(draw) -> None:
    cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    q, k, v = (draw(300, heads, 72) for heads in (8, 2, 2))
    mode = torch.cuda.get_sync_debug_mode()
    for now in (mode, "error"):  # once to compile
        torch.cuda.set_sync_debug_mode(now)
        try:
            out = softmax_attention.attention(q, k, v, cu_seqlens=cu_seqlens)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def test_replays_in_a_cuda_graph() -> None:
    q, k, v = (torch.randn(200, heads, 72, device="cuda").bfloat16() for heads in (8, 2, 2))
    softmax_attention.attention(q, k, v, lengths=(128, 72))  # compiles, and copies the lengths
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = softmax_attention.attention(q, k, v, lengths=(128, 72))
    q.normal_()
    graph.replay()
    assert torch.equal(out, softmax_attention.attention(q, k, v, lengths=(128, 72)))


def test_compiles_with_inductor(draw) -> None:
    q, k, v = (draw(1, 100, heads, 72) for heads in (8, 2, 2))

    def total(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return softmax_attention.attention(q * 2, k, v).float().square().sum()

    results = [function(q, k, v) for function in (torch.compile(total, fullgraph=True), total)]
    torch.testing.assert_close(*results, rtol=1e-2, atol=1.0)
    gradients = [torch.autograd.grad(x, (q, k, v)) for x in results]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
