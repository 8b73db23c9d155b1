"""What only a GPU can show of a block's operations: native rounding, large offsets, determinism."""

import pytest
import torch
from torch.nn import functional

from nextdit_kernels import sandwich

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = 1e-5


def gated(x, y, weight, gate):
    return x + torch.tanh(gate[:, None]) * functional.rms_norm(y, y.shape[-1:], weight, EPS)


@pytest.fixture
def inputs():
    def draw(batch: int, tokens: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(batch, tokens, width), (batch, tokens, width), (width,), (batch, width)]
        return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]

    return draw


@pytest.mark.parametrize("width", [96, 1152, 1536, 2304, 3072, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_is_at_most_twice_that_of_pytorch(inputs, width, dtype) -> None:
    ours = inputs(2, 1000, width, dtype)
    out = sandwich.gate_residual(*ours, eps=EPS)
    cotangent = torch.randn_like(out)
    mine = (out, *torch.autograd.grad(out, ours, cotangent))
    plain = gated(*ours)
    theirs = (plain, *torch.autograd.grad(plain, ours, cotangent))
    doubles = [x.detach().double().requires_grad_() for x in ours]
    exact = gated(*doubles)
    truth = (exact, *torch.autograd.grad(exact, doubles, cotangent.double()))
    for a, b, c in zip(mine, theirs, truth, strict=True):
        floor = 1e-6 * c.abs().max()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + floor


def test_result_is_the_exact_one_rounded_once(inputs) -> None:
    x, _, weight, scale = (t.detach() for t in inputs(2, 1000, 2304, torch.bfloat16))
    ours = sandwich.norm_modulate(x, weight, scale, eps=EPS)
    exact = functional.rms_norm(x.double(), x.shape[-1:], weight.double(), EPS)
    exact *= 1 + scale.double()[:, None]
    # Half a unit in the last place of bfloat16 is at most 2^-8 of the number.
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=2.0**-8 * 1.01)


def test_gradients_are_the_same_in_every_run(inputs) -> None:
    leaves = inputs(2, 4096, 1536, torch.bfloat16)
    runs = [
        torch.autograd.grad(sandwich.gate_residual(*leaves, eps=EPS).float().square().sum(), leaves)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_offsets_beyond_32_bits(inputs) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    tokens = 2**31 // 2304 + 1000
    x = torch.randn(1, tokens, 2304, device="cuda", dtype=torch.float16)
    weight, scale = torch.ones(2304, device="cuda"), torch.zeros(1, 2304, device="cuda")
    ours = sandwich.norm_modulate(x, weight, scale.half(), eps=EPS)
    expected = functional.rms_norm(x[:, -500:].float(), (2304,), None, EPS)
    torch.testing.assert_close(ours[:, -500:].float(), expected, atol=4e-3, rtol=0)


def test_other_resolutions_do_not_compile_again(inputs) -> None:
    kernels = sandwich.sandwich_kernel, sandwich.sandwich_backward_kernel
    if not all(hasattr(kernel, "device_caches") for kernel in kernels):
        pytest.skip("Triton does not show its cache of compiled kernels here")
    counts = set()
    for tokens in (256, 2, 77, 9000, 1023):
        leaves = inputs(2, tokens, 1536, torch.bfloat16)
        out = sandwich.gate_residual(*leaves, eps=EPS)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        device = torch.cuda.current_device()
        counts.add(tuple(len(kernel.device_caches[device][0]) for kernel in kernels))
    assert len(counts) == 1


def test_replays_in_a_cuda_graph(inputs) -> None:
    tensors = [t.detach() for t in inputs(1, 128, 1536, torch.bfloat16)]
    sandwich.gate_residual(*tensors, eps=EPS)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sandwich.gate_residual(*tensors, eps=EPS)
    tensors[1].normal_()
    graph.replay()
    assert torch.equal(out, sandwich.gate_residual(*tensors, eps=EPS))


def test_compiles_with_inductor(inputs) -> None:
    leaves = inputs(2, 100, 1536, torch.bfloat16)

    def total(x, y, weight, gate):
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
        return sandwich.gate_residual(x, y, weight, gate, eps=EPS).float().square().mean()

    compiled = torch.compile(total, fullgraph=True)
    ours, expected = compiled(*leaves), total(*leaves)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    mine, theirs = (torch.autograd.grad(x, leaves) for x in (ours, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2e-2)


def test_autocast_keeps_the_residual_stream_in_float32(monkeypatch) -> None:
    core = pytest.importorskip("nextdit_core", reason="nextdit-core is not installed; not required")
    torch.manual_seed(0)
    model = core.NextDiT(core.NextDiTConfig(token_dim=4, width=96, heads=4, layers=2, axes=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.cuda()
    tokens = core.Tokens(torch.randn(32, 4).cuda(), torch.rand(32, 3).cuda(), (16, 16))
    t = torch.tensor([0.2, 0.7]).cuda()
    monkeypatch.setenv("NEXTDIT_KERNELS", "torch")
    exact = model(tokens, t)
    errors = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("NEXTDIT_KERNELS", name)
        with torch.autocast("cuda", torch.bfloat16):
            velocity = model(tokens, t)
        errors[name] = (velocity.float() - exact).abs().max()
    assert errors["triton"] <= 2 * errors["torch"]
