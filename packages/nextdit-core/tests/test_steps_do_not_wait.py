"""What a step of sampling does besides arithmetic on the device: nothing.

The `meta` device stands in for an accelerator: what is copied to it from the host, and what is read
back, is seen in PyTorch's dispatcher all the same, and nothing can be computed on the way. Only
`torch.tensor` passes the dispatcher by there, and is seen where it is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowsolvers
import rope3d
from nextdit_core import (
    Conditioning,
    ContextDrop,
    Guidance,
    NextDiT,
    NextDiTConfig,
    PreparedConditioning,
    Tokens,
)
from nextdit_core.packed_prediction import PackedPrediction

DEVICE = torch.device("meta")
#: What makes a tensor out of nothing but numbers of the host.
MAKING = ("arange", "full", "zeros", "ones", "scalar_tensor", "lift_fresh", "repeat_interleave")


class Watch(TorchDispatchMode):
    """Notes every copy between devices, every value that is read, and what is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        reads = "_local_scalar_dense" in name or "lift_fresh" in name
        out = func(*args, **(kwargs or {}))
        places = {tensor.device.type for tensor in _tensors((args, kwargs, out))}
        if reads or places - {"meta"}:
            self.crossings.append(f"{name} on {places}")
        if any(f"aten.{making}" in name or f"new_{making}" in name for making in MAKING):
            self.made[name] += 1
        return out


class WatchCalls(TorchFunctionMode):
    """Notes calls that make a tensor of numbers on the host."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        making = func in (torch.tensor, torch.as_tensor, torch.from_numpy)
        if making and not isinstance(args[0], Tensor):
            self.watch.crossings.append(func.__name__)
            self.watch.made[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[Watch]:
    with Watch() as watch, WatchCalls(watch):
        yield watch


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    if isinstance(nested, (list, tuple)) or hasattr(nested, "__next__"):
        return [tensor for one in nested for tensor in _tensors(one)]
    return []


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses to say whether there is autocast on `meta`."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def _model(**changes: Any) -> NextDiT:
    sizes = {"token_dim": 4, "width": 64, "heads": 4, "kv_heads": 2, "layers": 2, "text_dim": 8}
    with torch.device(DEVICE):
        return NextDiT(NextDiTConfig(**(sizes | changes))).bfloat16().eval()


def _tokens(*shapes: tuple[int, int]) -> Tokens:
    positions = [rope3d.grid(frames=1, height=r, width=c) for r, c in shapes]
    lengths = tuple(len(one) for one in positions)
    values = torch.empty(sum(lengths), 4, dtype=torch.bfloat16, device=DEVICE)
    return Tokens(values, torch.cat(positions).to(DEVICE), lengths)


def _text(*lengths: int) -> Conditioning:
    text = torch.empty(len(lengths), 8, 8, dtype=torch.bfloat16, device=DEVICE)
    return Conditioning(text, torch.tensor(lengths).to(DEVICE), host_lengths=lengths)


@pytest.mark.parametrize(
    "crossing",
    [
        lambda: torch.tensor((1, 2), device=DEVICE),
        lambda: torch.zeros(2).to(DEVICE),
        lambda: torch.zeros(2)[0].item(),
        lambda: torch.zeros(2, device=DEVICE)[:1] + torch.zeros(1),
    ],
    ids=["made of numbers", "copied", "read", "mixed"],
)
def test_the_watch_sees(crossing: Callable[[], object]) -> None:
    with watched() as watch:
        try:
            crossing()
        except RuntimeError:  # two devices in one operation
            return
    assert watch.crossings


EXPERTS = {"time_experts": 4, "space_experts": 4}
TIMED = {"scale": "proportional", "trained_tokens": 8}


@pytest.mark.parametrize("solver", ["auto", "midpoint", "dpm2m"])
@pytest.mark.parametrize(
    ("shapes", "sizes", "options"),
    [
        (((3, 4), (3, 4)), {}, {}),
        (((3, 4), (2, 5)), {}, {}),
        (((3, 4), (2, 5)), EXPERTS, {}),
        (((3, 4), (3, 4)), EXPERTS, {}),
        (((3, 4), (2, 5)), {}, TIMED),
        (((3, 4), (2, 5)), {"qk_norm": False, "final_shift": True}, {"pad_to": 16}),
    ],
    ids=["dense", "packed", "packed experts", "dense experts", "packed proportional", "padded"],
)
def test_no_step_copies_reads_or_waits(
    shapes: tuple[tuple[int, int], ...],
    sizes: dict[str, Any],
    options: dict[str, Any],
    solver: str,
) -> None:
    """Of a whole guided solve, after its first step: model, guidance and solver together."""
    model, one = _model(**sizes), _tokens(*shapes)
    if options is TIMED:
        options = options | {"rope": model.rope.extrapolate("time-aware", scale=(1.0, 2.0, 2.0))}
    prepared = model.prepare(_text(5, 3, 1, 1))

    no_drop = ContextDrop(())
    both = PackedPrediction(model, prepared, Tokens.pack([one, one]), no_drop, options)
    alone = PackedPrediction(model, prepared.first(2), one, no_drop, options)
    token_dim = one.values.shape[-1]
    guidance = Guidance(3.0, channels=(0, 2))  # of three
    guided = guidance.velocity(both, alone, one.lengths, token_dim, 3)
    crossings: list[list[str]] = []
    with torch.no_grad(), watched() as watch:
        flowsolvers.solve(
            guided,
            one.values,
            nfe=6,
            solver=solver,
            on_step=lambda _: crossings.append(list(watch.crossings)),
        )
    assert len(crossings) >= 3
    assert crossings[-1][len(crossings[0]) :] == []


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (2, 5))], ids=["dense", "packed"])
def test_what_a_step_makes_anew_does_not_grow_with_the_layers(
    shapes: tuple[tuple[int, int], ...],
) -> None:
    one = _tokens(*shapes)

    def made(layers: int) -> Counter[str]:
        model = _model(layers=layers)
        prepared = model.prepare(_text(5, 3))
        velocity = PackedPrediction(model, prepared, one, ContextDrop(()), {})
        t = torch.empty((), device=DEVICE)
        with torch.no_grad():
            velocity(t, one.values)
            with watched() as watch:
                velocity(t, one.values)
        return watch.made

    few, many = made(1), made(4)
    if len(set(one.lengths)) == 1:  # PyTorch's mask of -inf, inside its attention
        key = "aten.scalar_tensor.default"
        few[key] = many[key] = 0
    assert few == many
    assert sum(few.values()) <= 6


@pytest.mark.parametrize(
    ("shapes", "options"),
    [(((3, 4), (3, 4)), {}), (((3, 4), (2, 5)), {}), (((3, 4), (2, 5)), {"pad_to": 16})],
    ids=["dense", "packed", "padded"],
)
def test_angles_are_computed_once_unless_they_follow_the_time(
    random: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shapes: tuple[tuple[int, int], ...],
    options: dict[str, Any],
) -> None:
    model = NextDiT(NextDiTConfig(token_dim=4, width=32, heads=4, text_dim=8)).eval()
    positions = [rope3d.grid(frames=1, height=r, width=c) for r, c in shapes]
    lengths = tuple(len(one) for one in positions)
    values = torch.randn(sum(lengths), 4, generator=random)
    tokens = Tokens(values, torch.cat(positions), lengths)
    t = torch.tensor([0.3, 0.3])
    calls: list[str] = []

    def counted(kind: type) -> None:
        own = kind.rotation

        def count(self: Any, *args: Any) -> rope3d.Rotation:
            calls.append(kind.__name__)
            return own(self, *args)

        monkeypatch.setattr(kind, "rotation", count)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
        prepared = model.prepare(Conditioning(torch.randn(2, 5, 8), torch.tensor([5, 3])))
        counted(rope3d.Rope)
        counted(rope3d.TimedRope)
        for method, count in ((None, 1), ("ntk", 1), ("time-aware", 3)):
            choice = dict(options)
            if method is not None:
                scale = (1.0, 2.0, 2.0)
                choice["rope"] = model.rope.extrapolate(method, scale=scale, trained=(1, 4, 4))
            expected = model(tokens, t, prepared, **choice)
            calls.clear()
            velocity = PackedPrediction(model, prepared, tokens, ContextDrop(()), choice)
            found = [velocity(t[0], values) for _ in range(3)]
            assert len(calls) == count
            assert all((one - expected).abs().max() <= 1e-6 for one in found)


def test_packed_samples_attend_to_packed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[rope3d.GatedText] = []
    attend = rope3d.attention

    def spy(*args: Any, text: rope3d.GatedText, **options: Any) -> Tensor:
        seen.append(text)
        return attend(*args, text=text, **options)

    monkeypatch.setattr(rope3d, "attention", spy)
    model, one = _model(), _tokens((3, 4), (2, 5))
    with torch.no_grad():
        model(one, torch.empty(2, device=DEVICE), _text(5, 3))
    assert [text.lengths for text in seen] == [(5, 3)] * 2
    assert all(text.mask is None and text.keys.shape == (8, 2, 16) for text in seen)


def test_packed_text_is_the_masked_text(random: torch.Generator) -> None:
    """On the CPU, with numbers: the text as rows with a mask, and packed."""
    model = NextDiT(NextDiTConfig(token_dim=4, width=32, heads=4, kv_heads=2, text_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    positions = [rope3d.grid(frames=1, height=r, width=2) for r in (3, 2, 5)]
    tokens = Tokens(torch.randn(20, 4, generator=random), torch.cat(positions), (6, 4, 10))
    same = Tokens(tokens.values[:18], torch.cat([positions[0]] * 3), (6, 6, 6))
    text = Conditioning(torch.randn(3, 7, 8, generator=random), torch.tensor([7, 2, 4]))
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        rows = model.prepare(text)
        packed = rows.in_one_row
        assert packed is rows.in_one_row
        assert (packed.batch, packed.mask, len(packed.text_keys[0])) == (3, None, 13)
        unknown = PreparedConditioning(rows.vector, rows.text_keys, rows.text_values, rows.mask)
        assert unknown.in_one_row is unknown
        for one in (tokens, same):
            expected = model(one, t, unknown)
            assert (model(one, t, packed) - expected).abs().max() <= 1e-5
            assert (model(one, t, rows) - expected).abs().max() <= 1e-5
            two = Tokens(
                one.values[: sum(one.lengths[:2])],
                one.positions[: sum(one.lengths[:2])],
                one.lengths[:2],
            )
            first = model(two, t[:2], packed.first(2))
            assert (first - expected[: len(first)]).abs().max() <= 1e-5
        full = Conditioning(text.text, torch.tensor([7, 7, 7]))
        assert model.prepare(full).mask is None
    with pytest.raises(ValueError, match="padded rows need their text in rows too"):
        model(tokens, t, packed, pad_to=10)
