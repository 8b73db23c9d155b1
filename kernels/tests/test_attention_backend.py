"""The attention backend as rope3d finds and uses it."""

from importlib.metadata import entry_points

import pytest
import torch

from nextdit_kernels import softmax_attention
from nextdit_kernels.attention_backend import ATTENTION

rope3d = pytest.importorskip("rope3d", reason="rope3d is not installed; it is not required")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


def test_entry_point_leads_to_the_backend() -> None:
    (entry,) = entry_points(group="rope3d.attention", name="triton")
    assert entry.load() is ATTENTION
    assert isinstance(ATTENTION, rope3d.GatedAttentionBackend)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"scale": torch.tensor([0.1, 0.4])},
        {"scale": "proportional", "trained_tokens": 4},
        {"key_mask": torch.tensor([[True] * 5 + [False] * 4, [False] * 9])},
    ],
    ids=["plain", "scale", "scale-per-sample", "proportional", "mask"],
)
def test_dense_attention_is_that_of_rope3d(draw, options) -> None:
    q, k, v = draw(2, 7, 4, 24), draw(2, 9, 2, 24), draw(2, 9, 2, 24)
    options = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    ours, theirs = (
        rope3d.attention(q, k, v, **options, backend=name) for name in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"scale": "proportional", "trained_tokens": 4}])
def test_packed_attention_is_that_of_rope3d(draw, options) -> None:
    q, k, v = draw(12, 4, 24), draw(12, 2, 24), draw(12, 2, 24)
    options = options | {"lengths": (5, 0, 7)}
    ours, theirs = (
        rope3d.attention(q, k, v, **options, backend=name) for name in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", ["dense", "packed", "packed-queries", "packed-queries-masked"])
def test_gated_text_is_that_of_rope3d_with_gradients(draw, form, monkeypatch) -> None:
    calls = []
    attend = softmax_attention.gated_cross_attention
    monkeypatch.setattr(
        softmax_attention,
        "gated_cross_attention",
        lambda *args, **kwargs: calls.append(args) or attend(*args, **kwargs),
    )
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    q, k, v = draw(2, 7, 4, 24), draw(2, 7, 2, 24), draw(2, 7, 2, 24)
    keys, values, gate = draw(2, 9, 2, 24), draw(2, 9, 2, 24), draw(4)
    leaves = [x.requires_grad_() for x in (q, k, v, keys, values, gate)]
    lengths = {"lengths": (7, 7)}
    if form == "dense":
        text, options = rope3d.GatedText(keys, values, gate, mask=mask.to(DEVICE)), {}
    elif form == "packed":
        kept = mask.to(DEVICE)
        text = rope3d.GatedText(keys[kept], values[kept], gate, lengths=(4, 9))
        options = lengths
    else:
        own = mask.to(DEVICE) if form == "packed-queries-masked" else None
        text, options = rope3d.GatedText(keys, values, gate, mask=own), lengths
    tensors = (q, k, v) if form == "dense" else tuple(x.flatten(0, 1) for x in (q, k, v))
    cotangent = draw(*tensors[0].shape)
    found = []
    for name in ("triton", "reference"):
        out = rope3d.attention(*tensors, **options, text=text, backend=name)
        found.append((out, *torch.autograd.grad(out, leaves, cotangent, retain_graph=True)))
    assert len(calls) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_refusals_say_what_is_served(draw) -> None:
    q, k = draw(7, 4, 24), draw(2, 9, 2, 24)
    with pytest.raises(ValueError, match=r"triton: head_dim is 24 and value_dim 16"):
        rope3d.attention(q, q, q[..., :16], backend="triton")
    text = rope3d.GatedText(k, k, draw(4), mask=torch.ones(2, 9, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match="leave the keys out and pack them"):
        rope3d.attention(q, q, q, lengths=(3, 4), text=text, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU bfloat16 is right")
def test_bfloat16_is_refused_in_the_interpreter(draw) -> None:
    q = draw(7, 4, 24).bfloat16()
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        rope3d.attention(q, q, q, backend="triton")


def test_compiles_without_graph_breaks(draw) -> None:
    q, k = draw(12, 4, 24), draw(12, 2, 24)

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return rope3d.attention(q, k, k, lengths=(5, 7), backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), attend(q, k))
