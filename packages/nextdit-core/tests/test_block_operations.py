"""Who carries out the operations of a block, and that all of a backbone goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode

from nextdit_core import NextDiT, NextDiTConfig, Tokens, UserError, block_operations, registry
from nextdit_core.commands.info import info

MODULE = """
from nextdit_core.block_operations import TorchBlock


class Toy(TorchBlock):
    name = "toy"
    calls = []

    def why_not_swiglu(self, gate, up):
        return "it is too wide" if gate.shape[-1] > 1000 else None

    def swiglu(self, gate, up):
        self.calls.append("swiglu")
        return super().swiglu(gate, up)

    def norm_modulate(self, *tensors, **numbers):
        self.calls.append("norm_modulate")
        return super().norm_modulate(*tensors, **numbers)

    def gate_residual(self, *tensors, **numbers):
        self.calls.append("gate_residual")
        return super().gate_residual(*tensors, **numbers)

    def norm_rotate(self, *tensors, **numbers):
        self.calls.append("norm_rotate")
        return super().norm_rotate(*tensors, **numbers)


TOY = Toy()
"""
ENTRY = "[nextdit.kernels]\n{0} = {1}:TOY\n"

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin without the environment variable and without what this machine has installed."""

    def toys(group: str) -> list[EntryPoint]:
        found = entry_points(group=group)
        return [entry for entry in found if entry.dist and entry.dist.name.startswith("toy-")]

    monkeypatch.delenv(block_operations.VARIABLE, raising=False)
    monkeypatch.setattr(registry, "entry_points", toys)
    block_operations.refresh()
    yield
    block_operations.refresh()


@pytest.fixture
def toy(install: Install) -> list[str]:
    """Install kernels that record their calls."""
    install("toy-kernels", "toy_kernels", ENTRY.format("toy", "toy_kernels"), MODULE)
    calls = registry.load(block_operations.GROUP, "toy").calls
    calls.clear()
    return calls


@pytest.fixture
def on_cuda() -> Callable[..., torch.Tensor]:
    """Tensors without numbers that say that they are on CUDA."""

    def empty(*shape: int) -> torch.Tensor:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return torch.empty(shape, device="cuda")

    return empty


def _velocity() -> torch.Tensor:
    torch.manual_seed(0)
    model = NextDiT(NextDiTConfig(token_dim=4, width=32, heads=4, layers=2, axes=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    samples = [Tokens(torch.randn(n, 4), torch.rand(n, 3), (n,)) for n in (3, 5)]
    return model(Tokens.pack(samples), torch.tensor([0.2, 0.7]))


def test_the_whole_backbone_goes_through_the_named_kernels(
    toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _velocity()
    assert toy == []
    monkeypatch.setenv("NEXTDIT_KERNELS", "toy")
    assert torch.equal(_velocity(), expected)
    attention = ["norm_modulate", "norm_rotate", "gate_residual"]
    layer = [*attention, "norm_modulate", "swiglu", "gate_residual"]
    assert toy == [*layer, *layer, "norm_modulate"]


def test_on_the_cpu_no_metadata_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", None)
    assert torch.isfinite(_velocity()).all()


def test_on_cuda_installed_kernels_take_what_they_serve(
    toy: list[str], on_cuda: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = on_cuda(2, 8), on_cuda(2, 1001)
    assert block_operations.choose("swiglu", narrow, narrow).name == "toy"
    assert block_operations.choose("swiglu", wide, wide) is block_operations.TORCH
    monkeypatch.setenv("NEXTDIT_KERNELS", "torch")
    assert block_operations.choose("swiglu", narrow, narrow) is block_operations.TORCH


def test_named_kernels_that_cannot_serve_say_why(
    toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "toy")
    wide = torch.zeros(1001)
    with pytest.raises(UserError, match=r"NEXTDIT_KERNELS names .* swiglu here: it is too wide"):
        block_operations.swiglu(wide, wide)


def test_an_unknown_name_lists_the_installed(
    toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "toi")
    with pytest.raises(UserError, match=r"unknown kernels 'toi'; accepted: toy"):
        _velocity()


def test_missing_kernels_that_are_known_say_how_to_get_them(
    toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "triton")
    with pytest.raises(UserError, match="pip install nextdit-kernels"):
        _velocity()


def test_two_claims_on_one_name_name_both(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for letter in "ab":
        module = f"toy_kernels_{letter}"
        install(f"toy-kernels-{letter}", module, ENTRY.format("twice", module), MODULE)
    monkeypatch.setenv("NEXTDIT_KERNELS", "twice")
    with pytest.raises(UserError, match=r"two distributions claim the kernels 'twice': toy-kern"):
        _velocity()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no such luck')", "failed to load .*RuntimeError: no such luck"),
        ("class TOY:\n    name = 'toy'\n    swiglu = None\n", "TOY lacks why_not_swiglu, norm_mod"),
    ],
)
def test_kernels_that_fail_to_load(
    install: Install,
    on_cuda: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    message: str,
) -> None:
    module = f"toy_broken_{len(source)}"
    install("toy-kernels", module, ENTRY.format("broken", module), source)
    x = on_cuda(2, 8)
    with pytest.warns(RuntimeWarning, match="'broken' of toy-kernels 1.2.*continuing without it"):
        assert block_operations.choose("swiglu", x, x) is block_operations.TORCH
    monkeypatch.setenv("NEXTDIT_KERNELS", "broken")
    with pytest.raises(UserError, match=message):
        block_operations.choose("swiglu", x, x)


@pytest.mark.parametrize("name", ["", "toy"])
def test_the_choice_does_not_break_the_graph(
    toy: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", name)

    def layer(x: torch.Tensor, weight: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        hidden = block_operations.norm_modulate(x, weight, m, eps=1e-5)
        hidden = block_operations.swiglu(hidden, hidden)
        return block_operations.gate_residual(x, hidden, weight, m, eps=1e-5)

    tensors = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 1, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), layer(*tensors))


def test_the_choice_is_explained(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(block_operations.explain()) == set(block_operations.OPERATIONS)
    monkeypatch.setenv("NEXTDIT_KERNELS", "toy")
    assert block_operations.explain()["gate_residual"] == "toy"
    monkeypatch.setenv("NEXTDIT_KERNELS", "toi")
    assert block_operations.explain()["swiglu"].startswith("error: unknown kernels 'toi'")


def test_the_command_line_tells_the_choice(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTDIT_KERNELS", "toy")
    lines = CliRunner().invoke(info).output.splitlines()
    assert ["gate_residual", "toy"] in [line.split() for line in lines]
