"""Mixtures of experts, against the authors' networks and a slow float64 loop.

`recorded/experts_{time,space,both}.safetensors` hold weights (exact in bfloat16), inputs and the
output of `DiT_Llama` of Next-DiT-MoE's models.py, models1.py and models2.py (Alpha-VLLM/Lumina-T2X
1c60696) in float32, with torch's linear and embedding layers in the place of fairscale's: dim 8,
2 layers, 2 heads, 1 key head, multiple_of 8, 5 classes, QK-norm, and random weights, none of them
zero. Where NEXTDIT_AUTHORS names a checkout of theirs, it is run besides.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import rope3d
from nextdit_core import (
    Conditioning,
    NextDiT,
    NextDiTConfig,
    Recipe,
    Tokens,
    UserError,
    train,
    watch_routing,
)
from nextdit_core.arrangement import arrange
from nextdit_core.checkpoints.model_args import read_model_args, write_model_args
from nextdit_core.checkpoints.save import model_args_of
from nextdit_core.experts import Experts, SpaceExperts, TimeExperts
from nextdit_core.training.activations import checkpoint_blocks

Kind = Literal["time", "space", "both"]
KINDS: tuple[Kind, ...] = ("time", "space", "both")
FIELDS = {
    "time": {"time_experts": 5},
    "space": {"space_experts": 5},
    "both": {"time_experts": 4, "space_experts": 3},
}


def _by(kind: str) -> Any:
    return None if kind == "both" else kind


# The authors' networks


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def recorded(kind: Kind) -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "recorded" / f"experts_{kind}.safetensors")


@pytest.fixture
def folder(recorded: dict[str, Tensor], tmp_path: Path) -> Path:
    weights = {n.removeprefix("weights."): w.float() for n, w in recorded.items() if "weig" in n}
    torch.save(weights, tmp_path / "consolidated.00-of-01.pth")
    return tmp_path


def _velocity(model: NextDiT, case: dict[str, Tensor], **options: Any) -> Tensor:
    x = case["x"]
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    patches = x.unflatten(2, (rows, 2)).unflatten(4, (columns, 2))
    values = patches.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4 * channels)
    positions = rope3d.grid(frames=1, height=rows, width=columns).repeat(batch, 1)
    tokens = Tokens(values, positions, (rows * columns,) * batch)
    with torch.no_grad():
        out = model(tokens, case["t"], model.prepare_classes(case["y"]), **options)
    return out.view(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def test_velocity_equals_the_authors(
    kind: Kind, folder: Path, recorded: dict[str, Tensor], parity: Callable[..., None]
) -> None:
    model = NextDiT.from_pretrained(folder, heads=2, experts_by=_by(kind))
    found = (model.config.time_experts, model.config.space_experts)
    assert found == {"time": (8, 0), "space": (0, 8), "both": (4, 4)}[kind]
    parity(f"experts of {kind}", _velocity(model, recorded), recorded["out"])


@pytest.fixture
def authors_code(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import their network from a checkout of Lumina-T2X, on one process and the CPU."""
    checkout = os.environ.get("NEXTDIT_AUTHORS")
    if not checkout:
        pytest.skip("no code of the authors: set NEXTDIT_AUTHORS to a checkout of Lumina-T2X")

    class Linear(nn.Linear):
        def __init__(self, *sizes: int, bias: bool = True, init_method: Any, **ignored: Any):
            super().__init__(*(*sizes, *ignored.values())[:2], bias=bias)
            init_method(self.weight)

    class Embedding(nn.Embedding):
        def __init__(self, *sizes: int, init_method: Any):
            super().__init__(*sizes)

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    parallel = "fairscale.nn.model_parallel"
    for name in ("fairscale", "fairscale.nn", parallel):
        module(name)
    module(f"{parallel}.initialize", get_model_parallel_world_size=lambda: 1)
    vars(sys.modules[parallel])["initialize"] = sys.modules[f"{parallel}.initialize"]
    layers = {"ColumnParallelLinear": Linear, "RowParallelLinear": Linear}
    module(f"{parallel}.layers", ParallelEmbedding=Embedding, **layers)
    module("flash_attn", flash_attn_func=None)
    unused = dict.fromkeys(("index_first_axis", "pad_input", "unpad_input"))
    module("flash_attn.bert_padding", **unused)
    name = {"time": "models", "space": "models1", "both": "models2"}[kind]
    file = Path(checkout) / "Next-DiT-MoE" / "models" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"authors_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # of SwiGLU
    spec.loader.exec_module(code)
    return code


@pytest.mark.filterwarnings("ignore:.torch.cuda.amp.autocast")
@pytest.mark.parametrize("seed", range(5))
def test_velocity_equals_the_authors_code_run_here(
    kind: Kind, authors_code: Any, seed: int, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(seed)
    heads = (2, 4, 6)[seed % 3]
    theirs = authors_code.DiT_Llama(
        dim=heads * 12,
        n_layers=1 + seed % 3,
        n_heads=heads,
        n_kv_heads=heads // 2,
        multiple_of=8,
        num_classes=7,
        qk_norm=seed != 1,
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=random) * size)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
        case = {
            "x": torch.randn(3, 4, 6, 10, generator=random),
            "t": torch.rand(3, generator=random),
            "y": torch.tensor([2, 6, 7]),
        }
        expected = theirs(case["x"], case["t"], case["y"])
    torch.save(theirs.state_dict(), tmp_path / "consolidated.00-of-01.pth")
    ours = NextDiT.from_pretrained(tmp_path, heads=heads, experts_by=_by(kind))
    assert (_velocity(ours, case) - expected).abs().max() <= 1e-5


def test_the_authors_layout_is_written_bit_for_bit(
    kind: Kind, folder: Path, recorded: dict[str, Tensor], tmp_path: Path
) -> None:
    model = NextDiT.from_pretrained(folder, heads=2, experts_by=_by(kind))
    model.save_pretrained(tmp_path / "ours")
    back = NextDiT.from_pretrained(tmp_path / "ours")  # which says what no tensor tells
    assert back.config == model.config
    back.save_pretrained(tmp_path / "theirs", layout="authors")
    written = load_file(tmp_path / "theirs" / "consolidated.00-of-01.safetensors")
    assert {f"weights.{name}" for name in written} == {n for n in recorded if "weights." in n}
    for name, tensor in written.items():
        expected = recorded[f"weights.{name}"].float()
        if name.startswith("final_layer.linear."):  # the half that is thrown away is zeros
            tensor, expected = (one.unflatten(0, (4, 8))[:, :4] for one in (tensor, expected))
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("size", "authors", "norms"),
    [
        ("600m-moe-time", 2_673_516_064, 2),
        ("600m-moe-space", 2_673_581_600, 2),
        ("600m-moe-both", 2_723_954_208, 3),
    ],
)
def test_named_sizes_have_the_authors_parameters(size: str, authors: int, norms: int) -> None:
    """Theirs have no weights in the norms before a sublayer, and twice the output."""
    config = NextDiTConfig.named(size, token_dim=16, classes=1000, final_shift=True)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in NextDiT(config).parameters())
    thrown_away = config.token_dim * (config.width + 1)
    assert count - norms * config.layers * config.width + thrown_away == authors


# A slow loop in float64


def _slow(layer: Experts, x: Tensor, seen: Tensor) -> Tensor:
    """Send token after token through its experts, as the formula says."""
    rows = []
    for token, sight in zip(x, seen, strict=True):
        logits = layer.gate.weight @ sight
        best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: layer.chosen]
        powers = [logits[i].exp() for i in best]
        total = torch.zeros_like(token)
        for i, power in zip(best, powers, strict=True):
            one = layer.layers[i]
            gate, up = one.w1.weight @ token, one.w3.weight @ token
            hidden = gate / (1.0 + (-gate).exp()) * up
            total = total + power / torch.stack(powers).sum() * (one.w2.weight @ hidden)
        rows.append(total)
    return torch.stack(rows)


def _drawn(layer: nn.Module, random: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=random) * size)


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
def test_experts_of_time_compute_the_formula(
    form: str, chosen: int, random: torch.Generator
) -> None:
    layer = TimeExperts(8, 16, experts=4, chosen=chosen, time_dim=6).double()
    _drawn(layer, random)
    lengths = (5, 5, 5) if form == "dense" else (3, 7, 5)
    values = torch.randn(15, 8, generator=random, dtype=torch.float64, requires_grad=True)
    time = torch.randn(3, 6, generator=random, dtype=torch.float64, requires_grad=True)
    tokens = Tokens(values, torch.zeros(15, 3), lengths)
    arrangement = arrange(tokens, pad_to=9 if form == "padded" else None)
    out = arrangement.take(layer(arrangement.place(values), time, arrangement))
    owner = [sample for sample, length in enumerate(lengths) for _ in range(length)]
    expected = _slow(layer, values, time[owner])
    assert (out - expected).abs().max() <= 1e-12
    weights = (values, time, *layer.parameters())
    up = torch.randn(out.shape, generator=random, dtype=torch.float64)
    found = torch.autograd.grad((out * up).sum(), weights)
    sure = torch.autograd.grad((expected * up).sum(), weights, allow_unused=True)
    for one, other in zip(found, sure, strict=True):
        assert (one - (0.0 if other is None else other)).abs().max() <= 1e-10


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_experts_of_space_compute_the_formula(chosen: int, random: torch.Generator) -> None:
    layer = SpaceExperts(8, 16, experts=4, chosen=chosen).double()
    _drawn(layer, random)
    x = torch.randn(2, 7, 8, generator=random, dtype=torch.float64, requires_grad=True)
    expected = _slow(layer, x.flatten(0, 1), x.flatten(0, 1)).view_as(x)
    out = layer(x)
    assert (out - expected).abs().max() <= 1e-12
    weights = (x, *layer.parameters())
    up = torch.randn(out.shape, generator=random, dtype=torch.float64)
    found = torch.autograd.grad((out * up).sum(), weights)
    sure = torch.autograd.grad((expected * up).sum(), weights, allow_unused=True)
    for one, other in zip(found, sure, strict=True):
        assert (one - (0.0 if other is None else other)).abs().max() <= 1e-10


def test_every_way_to_the_experts_gives_the_same(random: torch.Generator) -> None:
    """Side by side and one by one, in one grouped product, and each on all tokens."""
    layer = SpaceExperts(32, 48, experts=4, chosen=2)
    _drawn(layer, random)
    x = torch.randn(40, 32, generator=random)
    exact = _slow(layer.double(), x.double(), x.double())
    layer = layer.float()
    routing = layer.route(x)
    chosen = (routing.selected, routing.weights)
    for out in (layer._all(x, *chosen), layer._sorted(x, *chosen, grouped=False)):
        assert (out - exact).abs().max() <= 1e-5
    layer, half = layer.bfloat16(), x.bfloat16().requires_grad_()
    assert layer._stackable(torch.bfloat16)
    assert not layer._stackable(torch.float32)
    ways: list[Callable[[], Tensor]] = [
        lambda: layer._sorted(half, *chosen, grouped=True),
        lambda: layer._sorted(half, *chosen, grouped=False),
    ]
    up = torch.randn(40, 32, generator=random).bfloat16()
    weights = (half, *(p for n, p in layer.named_parameters() if "gate" not in n))
    outs = [way() for way in ways]
    grads = [torch.autograd.grad((out * up).sum(), weights) for out in outs]
    size = exact.abs().max()
    assert (outs[0] - outs[1]).abs().max() <= 2**-7 * size
    assert (outs[0] - exact).abs().max() <= 2**-5 * size
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 2**-6 * other.abs().max()


def test_an_expert_that_nobody_chose_has_a_zero_gradient(random: torch.Generator) -> None:
    """Data-parallel training waits for the gradient of every weight."""
    layer = TimeExperts(8, 16, experts=4, chosen=1, time_dim=6)
    tokens = Tokens(torch.randn(5, 8, generator=random), torch.zeros(5, 3), (5,))
    arrangement = arrange(tokens)
    time = torch.randn(1, 6, generator=random)
    layer(arrangement.place(tokens.values), time, arrangement).square().sum().backward()
    gradients = [one.w1.weight.grad for one in layer.layers]
    assert all(grad is not None for grad in gradients)
    assert sum(bool(grad.any()) for grad in gradients if grad is not None) == 1


# In a backbone


def _backbone(kind: Kind, random: torch.Generator, **sizes: Any) -> NextDiT:
    base = {"token_dim": 4, "width": 32, "heads": 4, "kv_heads": 2, "layers": 2, "multiple_of": 16}
    model = NextDiT(NextDiTConfig(**(base | FIELDS[kind] | sizes))).eval()
    _drawn(model, random)
    return model


def _samples(random: torch.Generator, *shapes: tuple[int, int]) -> list[Tokens]:
    return [
        Tokens(
            torch.randn(r * c, 4, generator=random),
            rope3d.grid(frames=1, height=r, width=c),
            (r * c,),
        )
        for r, c in shapes
    ]


def test_text_packed_and_padded_batches_equal_samples_alone(
    kind: Kind, random: torch.Generator
) -> None:
    model = _backbone(kind, random, text_dim=8)
    samples = _samples(random, (2, 3), (4, 4), (1, 1))
    t = torch.tensor([0.1, 0.5, 0.9])
    text = Conditioning(torch.randn(3, 6, 8, generator=random), torch.tensor([6, 2, 4]))
    with torch.no_grad():
        packed = model(Tokens.pack(samples), t, text)
        padded = model(Tokens.pack(samples), t, text, pad_to=20)
        alone = [
            model(one, t[i : i + 1], Conditioning(text.text[i : i + 1], text.lengths[i : i + 1]))
            for i, one in enumerate(samples)
        ]
    assert (packed - torch.cat(alone)).abs().max() <= 1e-5
    assert (padded - packed).abs().max() <= 1e-5


def test_every_parameter_gets_a_gradient(kind: Kind, random: torch.Generator) -> None:
    model = _backbone(kind, random, text_dim=8)
    batch = Tokens.pack(_samples(random, (6, 6), *[(3, 3)] * 15))
    t = torch.linspace(0, 1, 16)
    text = Conditioning(torch.randn(16, 5, 8, generator=random), torch.full((16,), 5))
    model(batch, t, text).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []
    still = [n for n, p in model.named_parameters() if not p.grad.any() and "experts" not in n]
    assert still == []


@pytest.mark.parametrize(
    ("packed", "dtype"),
    [(False, torch.bfloat16), (True, torch.float32)],
    ids=["dense bfloat16, grouped", "packed float32, all on all"],
)
def test_a_block_compiles_to_one_graph_over_times_and_resolutions(
    kind: Kind, packed: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    torch._dynamo.reset()
    model = _backbone(kind, random, text_dim=8).to(dtype)
    text = Conditioning(torch.randn(2, 5, 8, generator=random).to(dtype), torch.tensor([5, 3]))
    shapes = [(5, 7), (4, 6), (8, 8)]
    batches = [Tokens.pack(_samples(random, s, (s[0], 2) if packed else s)) for s in shapes]
    times = torch.linspace(0, 1, 3)
    counter = CompileCounter()
    with torch.no_grad():
        expected = [model(one, t.expand(2), text) for one in batches for t in times]
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=True)
        found, counts = [], []
        for one in batches:
            found += [model(one, t.expand(2), text) for t in times]
            counts.append(counter.frame_count)
    size = max(one.abs().max().item() for one in expected)
    bound = 1e-5 if dtype == torch.float32 else 2**-5 * size
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= bound
    assert counts[0] <= 2
    assert counts == counts[:1] * len(batches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_compiles_a_block_forward_and_back(
    dtype: torch.dtype, random: torch.Generator
) -> None:
    torch._dynamo.reset()
    model = _backbone("both", random, layers=1).to(dtype)
    (one,) = _samples(random, (5, 7))
    t = torch.tensor([0.3])
    loss = model(one, t).float().square().mean()
    loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=True)
    again = model(one, t).float().square().mean()
    again.backward()
    off = 1e-4 if dtype == torch.float32 else 2**-4
    assert (again - loss).abs() <= off * loss
    for name, p in model.named_parameters():
        assert (p.grad - before[name]).abs().max() <= off * max(1e-3, before[name].abs().max())


def test_what_routers_choose_can_be_watched(kind: Kind, random: torch.Generator) -> None:
    model = _backbone(kind, random)
    samples = _samples(random, (2, 3), (4, 4))
    t = torch.tensor([0.1, 0.8])
    with watch_routing() as seen:
        watched = model(Tokens.pack(samples), t)
    assert torch.equal(watched, model(Tokens.pack(samples), t))
    per_layer = {"time": [2], "space": [22], "both": [2, 22]}[kind]
    assert [len(one.selected) for one in seen] == per_layer * 2
    for one in seen:
        assert one.load.sum().item() == pytest.approx(1.0)
        assert one.importance.sum().item() == pytest.approx(1.0)
        assert (one.weights.sum(-1) - 1.0).abs().max() <= 1e-6
        shares = torch.stack([(one.selected == i).float().mean() for i in range(len(one.load))])
        assert (one.load - shares).abs().max() <= 1e-6
    sum(one.balance for one in seen).backward()  # type: ignore[union-attr]
    gates = [p for name, p in model.named_parameters() if "feed_forward" in name and "gate" in name]
    assert len(gates) == len(seen)
    assert all(gate.grad is not None and gate.grad.any() for gate in gates)
    with watch_routing() as later:
        pass
    assert later == []


def test_forgotten_activations_change_no_gradient(kind: Kind, random: torch.Generator) -> None:
    model = _backbone(kind, random)
    batch, t = Tokens.pack(_samples(random, (2, 3), (4, 4))), torch.tensor([0.1, 0.8])
    gradients = []
    for forget in (False, True):
        if forget:
            checkpoint_blocks(model)
        loss = model(batch, t).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_balance_is_one_where_all_experts_are_alike() -> None:
    layer = SpaceExperts(4, 8, experts=4, chosen=1)
    nn.init.eye_(layer.gate.weight)
    even = layer.route(torch.eye(4).repeat(3, 1) * 9)
    one_only = layer.route(torch.eye(4)[:1].repeat(12, 1) * 9)
    assert even.balance.item() == pytest.approx(1.0)
    assert one_only.balance.item() > 3.9


def test_adapters_and_quantised_weights_are_not_passed_by(random: torch.Generator) -> None:
    """Expert layers are called, where they are no plain linear layers any more."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = _backbone("both", random)
    (one,) = _samples(random, (3, 4))
    t = torch.tensor([0.4])
    with torch.no_grad():
        before = model(one, t)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"])
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        after = adapted(one, t)
        layer = model.blocks[0].feed_forward_space  # type: ignore[union-attr]
        assert isinstance(layer, SpaceExperts)
        assert not layer._stackable(torch.bfloat16)
        routing = layer.route(one.values.new_ones(5, 32))
        x = torch.randn(5, 32, generator=random)
        every = layer._all(x, routing.selected, routing.weights)
        apart = layer._sorted(x, routing.selected, routing.weights, grouped=False)
        assert (every - apart).abs().max() <= 1e-5
        merged = adapted.merge_and_unload()(one, t)
    assert (after - before).abs().max() > 1e-2
    assert (after - merged).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_experts_compute_in_its_format(random: torch.Generator) -> None:
    model = _backbone("both", random)
    (one,) = _samples(random, (3, 4))
    with torch.no_grad():
        exact = model(one, torch.tensor([0.4]))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(one, torch.tensor([0.4]))
            layer = model.blocks[0].feed_forward_time
            assert isinstance(layer, TimeExperts)
            routing = layer.route(torch.randn(5, 32, generator=random))
            x = torch.randn(5, 32, generator=random)
            chosen = (routing.selected, routing.weights)
            each = layer._sorted(x, *chosen, grouped=False)
            grouped = layer._sorted(x.bfloat16(), *chosen, grouped=True)
    assert (out - exact).abs().max() <= 0.1 * exact.abs().max()
    assert each.dtype == grouped.dtype == torch.bfloat16
    assert (each - grouped).abs().max() <= 2**-6 * each.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_experts": -1}, r"model\.time_experts is -1"),
        ({"space_experts": 1}, r"model\.space_experts is 1 and model\.experts_per_token 2"),
        ({"time_experts": 4, "experts_per_token": 0}, r"model\.experts_per_token 0"),
    ],
)
def test_experts_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NextDiTConfig(token_dim=4, **changes)  # type: ignore[arg-type]


def test_a_recipe_trains_experts(recipe: Callable[..., Recipe]) -> None:
    sizes = {"width": 16, "layers": 1, "heads": 2, "time_experts": 3, "space_experts": 2}
    checkpoint = train(recipe(model=sizes | {"experts_per_token": 1}, steps=2))
    config = NextDiT.from_pretrained(checkpoint).config
    assert (config.time_experts, config.space_experts, config.experts_per_token) == (3, 2, 1)


# On disk


def test_what_no_router_tells_is_asked_for(
    kind: Kind, folder: Path, recorded: dict[str, Tensor]
) -> None:
    if kind == "both":
        with pytest.raises(UserError, match="has experts of time and of space, so that experts_by"):
            NextDiT.from_pretrained(folder, heads=2, experts_by="time")
        return
    with pytest.raises(UserError, match=r"no tensor tells by what the 8 experts.*--experts-by"):
        NextDiT.from_pretrained(folder, heads=2)
    with pytest.raises(UserError, match="experts_by is 'sample'; expected 'time' or 'space'"):
        NextDiT.from_pretrained(folder, heads=2, experts_by="sample")  # type: ignore[arg-type]
    name = "DiT_Llama_600M_patch2" + ("_Spatial" if kind == "space" else "")
    write_model_args(folder / "model_args.pth", {"model": name, "qk_norm": True})
    model = NextDiT.from_pretrained(folder, heads=2)
    assert (_velocity(model, recorded) - recorded["out"]).abs().max() <= 1e-5


def test_a_router_tells_by_its_width(kind: Kind, tmp_path: Path) -> None:
    """Beyond a width of 1024 the timestep embedding is narrower than a token."""
    config = NextDiTConfig(
        token_dim=16,
        width=1536,
        layers=1,
        heads=32,
        classes=2,
        final_shift=True,
        ffn_dim_multiplier=0.002,
        multiple_of=8,
        **FIELDS[kind],
    )
    model = NextDiT(config)
    model.save_pretrained(tmp_path / "theirs", layout="authors")
    read = NextDiT.from_pretrained(tmp_path / "theirs")
    found = (read.config.time_experts, read.config.space_experts)
    assert found == (config.time_experts, config.space_experts)
    if kind == "time":
        with pytest.raises(UserError, match="takes 1024 numbers, where a router by space "):
            NextDiT.from_pretrained(tmp_path / "theirs", experts_by="space")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("600m-moe-time", "DiT_Llama_600M_patch2"),
        ("600m-moe-space", "DiT_Llama_600M_patch2_Spatial"),
        ("600m-moe-both", "DiT_Llama_600M_patch2_Both"),
    ],
)
def test_the_authors_scripts_are_told_their_constructor(
    size: str, said: str, tmp_path: Path
) -> None:
    config = NextDiTConfig.named(size, token_dim=16, classes=1000, final_shift=True)
    args = model_args_of(config)
    assert args is not None
    write_model_args(tmp_path / "model_args.pth", args)
    read = read_model_args(tmp_path / "model_args.pth")
    assert (read["model"], read["num_classes"]) == (said, 1000)


def test_layouts_without_experts_refuse_them(
    kind: Kind, random: torch.Generator, tmp_path: Path
) -> None:
    with_text = _backbone(kind, random, text_dim=8)
    for layout in ("diffusers", "authors"):
        with pytest.raises(UserError, match=r"feed-forward layers are experts, and theirs are pl"):
            with_text.save_pretrained(tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    with_classes = _backbone(kind, random, classes=3, final_shift=True)
    with pytest.raises(UserError, match="feed-forward layers are experts"):
        with_classes.save_pretrained(tmp_path / "out", layout="diffusers")


def test_a_text_conditional_mixture_is_kept_in_our_layout(
    kind: Kind, random: torch.Generator, tmp_path: Path
) -> None:
    model = _backbone(kind, random, text_dim=8, experts_per_token=1)
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    back = NextDiT.from_pretrained(tmp_path / "ours")
    assert back.config == model.config
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_experts_that_are_missing_are_told_before_anything_is_built(
    kind: Kind, random: torch.Generator, tmp_path: Path
) -> None:
    _backbone(kind, random).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    weights = load_file(file)
    place = "feed_forward_time" if kind == "both" else "feed_forward"
    last = max(n for n in weights if n.startswith(f"layers.0.{place}.experts") and "w1" in n)
    del weights[last]
    save_file(weights, file)
    (tmp_path / "ours" / "complete.json").unlink()
    with pytest.raises(UserError, match="says experts"):
        NextDiT.from_pretrained(tmp_path / "ours")
