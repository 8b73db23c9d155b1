"""What only a GPU can show: a whole sample in a CUDA graph, and a loop that never waits."""

import math

import pytest
import torch

import flowsolvers as fs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def velocity(t, x):
    return x.sin() + t


@pytest.mark.parametrize("solver", fs.solvers())
def test_a_whole_sample_is_one_cuda_graph(solver):
    plan = fs.plan(solver, nfe=8)
    x0 = torch.randn(4, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # puts the times on the device, outside the graph
        fs.solve(velocity, x0, plan=plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fs.solve(velocity, x0, plan=plan).x
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        x0.copy_(torch.randn(4, 16, device="cuda", generator=generator))
        graph.replay()
        torch.testing.assert_close(captured, fs.solve(velocity, x0, plan=plan).x, rtol=0, atol=0)


@pytest.mark.parametrize("solver", fs.solvers())
def test_the_loop_never_waits(solver):
    plan = fs.plan(solver, nfe=8)
    tree = {"a": torch.randn(4, device="cuda"), "b": torch.randn(3, 2, device="cuda")}
    whole = lambda t, x: {name: velocity(t, leaf) for name, leaf in x.items()}  # noqa: E731
    fs.solve(whole, tree, plan=plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fs.solve(whole, tree, plan=plan, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nan_is_found_at_the_end_and_named():
    def broken(t, x):
        return torch.where(t > 0.5, x * math.nan, x)

    x0 = torch.ones(8, device="cuda")
    for check in (None, True):
        with pytest.raises(fs.NotFiniteError, match="step 3 of 4"):
            fs.solve(broken, x0, nfe=4, solver="euler", check=check)


def test_the_same_on_the_cpu():
    x0 = torch.randn(64, dtype=torch.float64)
    for solver in fs.solvers():
        there = fs.solve(velocity, x0.cuda(), nfe=12, solver=solver).x.cpu()
        torch.testing.assert_close(there, fs.solve(velocity, x0, nfe=12, solver=solver).x)
