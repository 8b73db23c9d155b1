"""What only a GPU can show: native rounding, large offsets, one compilation, another device."""

import pytest
import torch
from torch.nn import functional

from nextdit_kernels import qk_norm, rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate with PyTorch in the dtype of the inputs."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@pytest.fixture
def tables():
    def build(tokens: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(tokens, device="cuda", dtype=torch.float64)
        angle = torch.outer(position, 10000.0 ** (-torch.arange(pairs, device="cuda") / pairs))
        return angle.cos().float(), angle.sin().float()

    return build


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_pytorch(tables, head_dim, dtype) -> None:
    torch.manual_seed(0)
    cos, sin = tables(4096, head_dim // 2)
    inputs = [
        torch.randn(1, 4096, heads, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (32, 8)
    ]
    outputs = rotary.rotate(*inputs, cos, sin)
    cotangents = [torch.randn_like(x) for x in inputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    turned = [(x, y, sin) for x, y in zip(inputs, outputs, strict=True)]
    turned += [(x, y, -sin) for x, y in zip(cotangents, gradients, strict=True)]
    for x, ours, sine in turned:
        exact = plain_rotation(x.detach().float(), cos, sine)
        theirs = (plain_rotation(x.detach(), cos, sine).float() - exact).abs().max()
        assert (ours.float() - exact).abs().max() <= 2 * theirs


def test_result_is_the_exact_one_rounded_once(tables) -> None:
    q = torch.randn(2, 1000, 8, 72, device="cuda").bfloat16()
    cos, sin = tables(1000, 36)
    exact = plain_rotation(q.double(), cos.double(), sin.double())
    ours, _ = rotary.rotate(q, q, cos, sin)
    # Half a unit in the last place of bfloat16 is at most 2^-8 of the number.
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=2.0**-8 * 1.01)


def test_offsets_beyond_32_bits(tables) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    heads, tokens = 32, 2**31 // (32 * 72) + 1000
    q = torch.randn(1, tokens, heads, 72, device="cuda", dtype=torch.float16)
    k = q[:, :, :1]
    cos, sin = tables(tokens, 36)
    ours, _ = rotary.rotate(q, k, cos, sin)
    last = slice(tokens - 500, None)
    expected = plain_rotation(q[:, last].float(), cos[last], sin[last])
    torch.testing.assert_close(ours[:, last].float(), expected, atol=4e-3, rtol=0)


def test_other_resolutions_do_not_compile_again(tables) -> None:
    if not hasattr(rotary.rotate_qk_kernel, "device_caches"):
        pytest.skip("Triton does not show its cache of compiled kernels here")
    caches = rotary.rotate_qk_kernel.device_caches
    counts = set()
    for tokens in (256, 1, 77, 1024, 1023):
        q = torch.randn(2, tokens, 16, 72, device="cuda").bfloat16()
        rotary.rotate(q, q[:, :, :4], *tables(tokens, 36))
        counts.add(len(caches[torch.cuda.current_device()][0]))
    assert len(counts) == 1


def test_replays_in_a_cuda_graph(tables) -> None:
    q, k = (torch.randn(1, 128, heads, 72, device="cuda").bfloat16() for heads in (8, 2))
    cos, sin = tables(128, 36)
    rotary.rotate(q, k, cos, sin)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = rotary.rotate(q, k, cos, sin)
    q.normal_()
    graph.replay()
    assert torch.equal(outputs[0], rotary.rotate(q, k, cos, sin)[0])


def test_compiles_with_inductor(tables) -> None:
    cos, sin = tables(100, 36)
    q, k = (torch.randn(1, 100, heads, 72, device="cuda").bfloat16() for heads in (8, 2))

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = rotary.rotate(q.transpose(0, 1).contiguous().transpose(0, 1), k, cos, sin)
        return q.float().sum() + k.float().sum()

    compiled = torch.compile(scores, fullgraph=True)
    torch.testing.assert_close(compiled(q, k), scores(q, k), atol=0.5, rtol=1e-2)


def plain_norm_rotation(x, cos, sin, weight, bias, norm, over) -> torch.Tensor:
    """Normalise and rotate with PyTorch in the dtype of the inputs."""
    groups = x.flatten(-2) if over == "hidden" else x
    if norm == "layer":
        groups = functional.layer_norm(groups, groups.shape[-1:], weight, bias, 1e-5)
    else:
        groups = functional.rms_norm(groups, groups.shape[-1:], weight, 1e-5)
    return plain_rotation(groups.view(x.shape), cos, sin)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "norm", "over"),
    [
        (32, 8, 72, "layer", "hidden"),
        (40, 40, 128, "rms", "hidden"),
        (24, 24, 128, "rms", "head"),
        (24, 8, 96, "rms", "head"),
        (16, 16, 64, "layer", "head"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_error_is_at_most_twice_that_of_pytorch(
    tables, heads, kv_heads, head_dim, norm, over, dtype
) -> None:
    torch.manual_seed(0)
    cos, sin = tables(1021, head_dim // 2)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()

    qk = {"q": leaf(2, 1021, heads, head_dim), "k": leaf(2, 1021, kv_heads, head_dim)}
    given = {}
    for name, x in qk.items():
        width = x.shape[-2] * head_dim if over == "hidden" else head_dim
        given[f"{name}_weight"] = leaf(width)
        if norm == "layer":
            given[f"{name}_bias"] = leaf(width)
    outputs = qk_norm.norm_rotate(**qk, cos=cos, sin=sin, **given, norm=norm, over=over)
    for (name, x), ours in zip(qk.items(), outputs, strict=True):
        own = [x, *(given[n] for n in (f"{name}_weight", f"{name}_bias") if n in given)]
        cotangent = torch.randn_like(x)
        mine = (ours, *torch.autograd.grad(ours, own, cotangent, retain_graph=True))
        results = []
        for kind in (torch.float32, dtype):
            leaves = [y.detach().to(kind).requires_grad_() for y in own]
            weight, bias, *_ = [*leaves[1:], None]
            y = plain_norm_rotation(leaves[0], cos, sin, weight, bias, norm, over)
            results.append((y, *torch.autograd.grad(y, leaves, cotangent.to(kind))))
        for got, exact, theirs in zip(mine, *results, strict=True):
            allowed = 2 * (theirs.float() - exact).abs().max()
            assert (got.float() - exact).abs().max() <= allowed


def test_norm_of_other_resolutions_does_not_compile_again(tables) -> None:
    kernels = (qk_norm.norm_rotate_kernel, qk_norm.norm_rotate_backward_kernel)
    if not all(hasattr(kernel, "device_caches") for kernel in kernels):
        pytest.skip("Triton does not show its cache of compiled kernels here")
    counts = set()
    for tokens in (256, 1, 77, 1024, 1023):
        q, k = (torch.randn(2, tokens, heads, 72, device="cuda").bfloat16() for heads in (16, 4))
        given = {"q_weight": None, "k_weight": None}
        outputs = qk_norm.norm_rotate(q.requires_grad_(), k, *tables(tokens, 36), **given)
        torch.autograd.grad(outputs, q, [torch.randn_like(x) for x in outputs])
        device = torch.cuda.current_device()
        counts.add(tuple(len(kernel.device_caches[device][0]) for kernel in kernels))
    assert len(counts) == 1


def test_norm_replays_in_a_cuda_graph(tables) -> None:
    q, k = (torch.randn(1, 128, heads, 72, device="cuda").bfloat16() for heads in (8, 2))
    weights = {"q_weight": torch.randn(576, device="cuda"), "k_weight": None}
    cos, sin = tables(128, 36)
    qk_norm.norm_rotate(q, k, cos, sin, **weights)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = qk_norm.norm_rotate(q, k, cos, sin, **weights)
    q.normal_()
    graph.replay()
    assert torch.equal(outputs[0], qk_norm.norm_rotate(q, k, cos, sin, **weights)[0])


def test_norm_offsets_beyond_32_bits(tables) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    tokens = 2**31 // (32 * 72) + 1000
    q = torch.randn(1, tokens, 32, 72, device="cuda", dtype=torch.float16)
    cos, sin = tables(tokens, 36)
    ours, _ = qk_norm.norm_rotate(q, q[:, :, :1], cos, sin, q_weight=None, k_weight=None)
    last = slice(tokens - 500, None)
    expected = plain_norm_rotation(
        q[:, last].float(), cos[last], sin[last], None, None, "layer", "hidden"
    )
    torch.testing.assert_close(ours[:, last].float(), expected, atol=8e-3, rtol=0)


@pytest.mark.parametrize("over", ["hidden", "head"])
def test_norm_compiles_with_inductor(tables, over) -> None:
    cos, sin = tables(100, 36)
    q, k = (torch.randn(1, 100, heads, 72, device="cuda").bfloat16() for heads in (8, 2))
    given = {"q_weight": None, "k_weight": None, "over": over}

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = qk_norm.norm_rotate(
            q.transpose(0, 1).contiguous().transpose(0, 1), k, cos, sin, **given
        )
        return q.float().sum() + k.float().sum()

    compiled = torch.compile(scores, fullgraph=True)
    torch.testing.assert_close(compiled(q, k), scores(q, k), atol=0.5, rtol=1e-2)
