"""How an operator is called: directly where nobody watches, through PyTorch where somebody does."""

import time

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nextdit_kernels import operators

LAUNCHES = []


def launch(x: torch.Tensor, factor: float) -> torch.Tensor:
    LAUNCHES.append(factor)
    return x.detach() * factor


def fake(x: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.empty_like(x)


def setup_context(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def backward(ctx, grad):
    return scaled_backward(grad, ctx.factor), None


scaled = operators.define(
    "test_scaled(Tensor x, float factor) -> Tensor",
    launch,
    fake,
    setup_context=setup_context,
    backward=backward,
)
scaled_backward = operators.define(
    "test_scaled_backward(Tensor grad, float factor) -> Tensor", launch, fake
)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_eagerly_the_launch_runs_once_and_differentiates() -> None:
    LAUNCHES.clear()
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0).sum(), x)
    assert LAUNCHES == [2.0, 2.0]
    assert grad.tolist() == [2.0] * 3
    assert not scaled(x.detach(), 2.0).requires_grad
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad


def test_a_second_derivative_is_an_error() -> None:
    x = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


def test_modes_and_fake_tensors_see_the_operator() -> None:
    x = torch.ones(3)
    with Watching() as watching:
        scaled(x, 2.0)
    assert watching.seen == ["nextdit_kernels.test_scaled.default"]
    LAUNCHES.clear()
    with FakeTensorMode():
        assert scaled(torch.ones(3), 2.0).shape == (3,)
    assert LAUNCHES == []


def test_parameters_are_no_strangers() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    scaled(parameter, 2.0).sum().backward()
    assert parameter.grad.tolist() == [2.0] * 3


def test_compiled_graphs_hold_the_operator_and_its_backward() -> None:
    graphs = []

    def record(module, inputs):
        graphs.append(module)
        return make_boxed_func(module.forward)

    compiled = torch.compile(
        lambda x: scaled(x, 2.0) + 1,
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
    )
    x = torch.ones(3, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    assert "nextdit_kernels.test_scaled.default" in targets[0]
    assert "nextdit_kernels.test_scaled_backward.default" in targets[1]


def test_opcheck() -> None:
    x = torch.ones(3, requires_grad=True)
    torch.library.opcheck(torch.ops.nextdit_kernels.test_scaled.default, (x, 2.0))


def test_host_overhead_of_a_call_is_below_15_microseconds() -> None:
    """Best of many batches, so that a busy machine does not fail it."""
    x = torch.ones(3)

    def best(function) -> float:
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            for _ in range(100):
                function(x, 2.0)
            times.append((time.perf_counter() - begin) / 100)
        return min(times)

    assert best(scaled) - best(launch) < 15e-6
    x.requires_grad_()
    assert best(scaled) - best(launch) < 15e-6
    LAUNCHES.clear()
