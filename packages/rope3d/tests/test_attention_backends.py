"""Who attends: every backend against softmax written out in float64, and the choice among them."""

import inspect
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

import rope3d
from rope3d import attention_backends, plugins
from rope3d.attend_flash import FLASH_3, FLASH_4, FLASH_VARLEN
from rope3d.attend_reference import WRITTEN_OUT
from rope3d.attend_sdpa import CUDNN, SDPA
from rope3d.attention_case import AttentionCase

DOUBLING = """
class Doubling:
    name = "doubling"
    def why_not(self, case):
        return "head_dim above 64" if case.q.shape[-1] > 64 else None
    def attend(self, case):
        return case.q * 2
    def attend_gated(self, case, gate, out):
        return out * 3
BACKEND = Doubling()
"""


def exact(q, k, v, scale, mask=None):
    """One sample in float64: q [T, H, D], k and v [S, Hkv, D], mask [S]."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        keys, values = k[:, head // group], v[:, head // group]
        if mask is not None:
            keys, values = keys[mask], values[mask]
        if len(keys) == 0:
            heads.append(torch.zeros(len(q), v.shape[-1], dtype=torch.float64))
            continue
        weights = (scale * q[:, head] @ keys.T).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ values)
    return torch.stack(heads, dim=1)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def cases(draw):
    """A case of every form, and its float64 answer."""
    mask = torch.tensor([[True] * 3 + [False] * 2, [False] * 5, [False, True] * 2 + [True]])
    found = {}

    q, k, v = draw(3, 7, 4, 16), draw(3, 5, 2, 16), draw(3, 5, 2, 8)
    for name, scales, key_mask in [
        ("dense", (0.25,) * 3, None),
        ("dense-masked", (0.25,) * 3, mask),
        ("dense-scale-per-sample", (0.1, 0.3, 0.7), None),
    ]:
        rows = [None] * 3 if key_mask is None else key_mask
        answer = torch.stack([exact(*x) for x in zip(q, k, v, scales, rows, strict=True)])
        scale = torch.tensor(scales) if len(set(scales)) > 1 else scales[0]
        found[name] = (AttentionCase(q, k, v, scale, key_mask=key_mask), answer)

    lengths, key_lengths = (4, 4, 0, 3, 2), (5, 5, 2, 0, 7)
    q, k, v = draw(13, 4, 16), draw(19, 2, 16), draw(19, 2, 8)
    samples = [x.split(n) for x, n in ((q, lengths), (k, key_lengths), (v, key_lengths))]
    for name, scale in [
        ("packed", 0.25),
        ("packed-scale-per-sample", (0.1, 0.3, 0.2, 0.4, 0.7)),
        ("packed-scale-on-device", torch.tensor([0.1, 0.3, 0.2, 0.4, 0.7])),
    ]:
        scales = [scale] * 5 if isinstance(scale, float) else [float(s) for s in scale]
        answer = torch.cat([exact(*x) for x in zip(*samples, scales, strict=True)])
        found[name] = (AttentionCase(q, k, v, scale, lengths, key_lengths), answer)

    q, k, v, lengths = draw(9, 4, 16), draw(3, 5, 2, 16), draw(3, 5, 2, 8), (3, 3, 3)
    for name, own, key_mask in [
        ("packed-queries", (3, 3, 3), mask),
        ("packed-queries-of-different-lengths", (6, 0, 3), mask),
        ("packed-queries-unmasked", (2, 5, 2), None),
    ]:
        rows = [None] * 3 if key_mask is None else key_mask
        parts = zip(q.split(own), k, v, (0.25,) * 3, rows, strict=True)
        answer = torch.cat([exact(*x) for x in parts])
        found[name] = (AttentionCase(q, k, v, 0.25, own, key_mask=key_mask), answer)
    return found


FORMS = [
    *("dense", "dense-masked", "dense-scale-per-sample", "packed", "packed-scale-per-sample"),
    *("packed-scale-on-device", "packed-queries", "packed-queries-of-different-lengths"),
    "packed-queries-unmasked",
]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution that offers one attention backend."""

    def write(distribution: str, name: str, code: str) -> str:
        folder, module = tmp_path / distribution, distribution.replace("-", "_")
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0")
        (info / "entry_points.txt").write_text(f"[rope3d.attention]\n{name} = {module}:BACKEND\n")
        (folder / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)
        attention_backends.refresh()
        return module

    yield write
    monkeypatch.undo()
    attention_backends.refresh()


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(attention_backends.VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Say which GPU there is, where there is none."""

    def pretend(major: int, *, cudnn: bool = True) -> None:
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda p: cudnn)

    return pretend


def on_cuda(head_dim=72, tokens=4096, *, lengths=None, dtype=torch.bfloat16, mask=False):
    with FakeTensorMode():
        shape = (sum(lengths),) if lengths else (2, tokens)
        q = torch.empty(*shape, 8, head_dim, device="cuda", dtype=dtype)
        k = torch.empty(*shape, 2, head_dim, device="cuda", dtype=dtype)
        key_mask = torch.empty(2, tokens, dtype=torch.bool, device="cuda") if mask else None
    return AttentionCase(q, k, k, 0.1, lengths, lengths, key_mask)


@pytest.mark.parametrize("backend", [SDPA, WRITTEN_OUT], ids=lambda backend: backend.name)
@pytest.mark.parametrize("form", FORMS)
def test_equals_softmax_written_out(cases, backend, form) -> None:
    case, answer = cases[form]
    assert backend.why_not(case) is None
    torch.testing.assert_close(backend.attend(case).double(), answer, atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_both_agree_and_are_finite(cases, form) -> None:
    case, answer = cases[form]
    grads = []
    for backend in (SDPA, WRITTEN_OUT):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out = backend.attend(replace(case, q=leaves[0], k=leaves[1], v=leaves[2]))
        grads.append(torch.autograd.grad(out, leaves, answer.float()))
    for mine, theirs in zip(*grads, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def fake_package(monkeypatch, name: str, extra) -> list[dict]:
    """A package of flash-attention's functions that computes with the reference."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        calls.append({"dense": True})
        return extra(WRITTEN_OUT.attend(AttentionCase(q, k, v, softmax_scale)))

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
    ):
        calls.append({"longest": (max_seqlen_q, max_seqlen_k), "dtype": cu_seqlens_q.dtype})
        sizes = [tuple(x.diff().tolist()) for x in (cu_seqlens_q, cu_seqlens_k)]
        return extra(WRITTEN_OUT.attend(AttentionCase(q, k, v, softmax_scale, *sizes)))

    module = ModuleType(name)
    module.__dict__.update(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    for parent in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, parent, module)
    return calls


@pytest.mark.parametrize("backend", [FLASH_3, FLASH_4], ids=lambda backend: backend.name)
@pytest.mark.parametrize("extra", [lambda out: out, lambda out: (out, None)])
@pytest.mark.parametrize("form", ["dense", "dense-scale-per-sample", "packed"])
def test_newer_flash_attention_gets_what_it_asks_for(
    cases, monkeypatch, backend, extra, form
) -> None:
    calls = fake_package(monkeypatch, backend.module, extra)
    case, answer = cases[form]
    torch.testing.assert_close(backend.attend(case).double(), answer, atol=2e-6, rtol=0)
    if form == "packed":
        assert calls == [{"longest": (4, 7), "dtype": torch.int32}]


def test_varlen_attention_of_pytorch_gets_what_it_asks_for(cases, monkeypatch) -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def attend(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["enable_gqa"]
        assert given["cu_seq_q"].dtype == torch.int32
        assert (given["max_q"], given["max_k"]) == (4, 7)
        sizes = [tuple(given[x].diff().tolist()) for x in ("cu_seq_q", "cu_seq_k")]
        tensors = (given["query"], given["key"], given["value"])
        return WRITTEN_OUT.attend(AttentionCase(*tensors, given["scale"], *sizes))

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    for form in ("packed", "packed-scale-per-sample", "packed-scale-on-device"):
        case, answer = cases[form]
        torch.testing.assert_close(FLASH_VARLEN.attend(case).double(), answer, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        (FLASH_VARLEN, lambda: on_cuda(), "for packed samples"),
        (FLASH_VARLEN, lambda: on_cuda(lengths=(3, 4), dtype=torch.float32), "bfloat16 and"),
        (FLASH_VARLEN, lambda: on_cuda(76, lengths=(3, 4)), "multiples of 8 up to 256"),
        (FLASH_VARLEN, lambda: on_cuda(lengths=(3, 0)), "a sample has no keys"),
        (FLASH_3, lambda: on_cuda(), "flash_attn_interface is not installed"),
        (CUDNN, lambda: on_cuda(mask=True), "without a mask"),
        (CUDNN, lambda: on_cuda(dtype=torch.float32), "bfloat16 and float16"),
    ],
)
def test_refusals_say_what_is_served(gpu, backend, case, reason) -> None:
    gpu(9)
    assert reason in backend.why_not(case())


def test_newer_flash_attention_is_refused_on_other_gpus_and_untried_backward(
    gpu, monkeypatch
) -> None:
    fake_package(monkeypatch, FLASH_3.module, lambda out: out)
    fake_package(monkeypatch, FLASH_4.module, lambda out: out)
    monkeypatch.setattr("rope3d.attend_flash.find_spec", lambda name: object())
    gpu(8)
    assert "compute capability 8.x" in FLASH_3.why_not(on_cuda())
    gpu(10)
    assert FLASH_4.why_not(on_cuda(72)) is None
    case = on_cuda(72)
    case.q.requires_grad_()
    assert "backward pass serves head_dim (64, 128)" in FLASH_4.why_not(case)
    assert "up to 128" in FLASH_4.why_not(on_cuda(256))


def test_choice_on_cuda(gpu, monkeypatch, install) -> None:
    def chosen(case):
        return attention_backends.choose(case).name

    install("doubling-attention", "doubling", DOUBLING)
    gpu(9)
    assert chosen(on_cuda(72)) == "sdpa"
    assert chosen(on_cuda(128)) == "cudnn"
    assert chosen(on_cuda(128, tokens=256)) == "sdpa"
    assert chosen(on_cuda(128, mask=True)) == "sdpa"
    assert chosen(on_cuda(72, lengths=(3, 4))) == "flash-varlen"
    assert chosen(on_cuda(72, lengths=(4, 4))) == "sdpa"  # one dense call
    assert chosen(on_cuda(64, lengths=(3, 4), dtype=torch.float32)) == "doubling"
    assert chosen(on_cuda(72, lengths=(3, 4), dtype=torch.float32)) == "sdpa"
    gpu(9, cudnn=False)
    assert chosen(on_cuda(128)) == "sdpa"
    gpu(8)
    assert chosen(on_cuda(128)) == "sdpa"
    monkeypatch.setattr("rope3d.attend_flash.find_spec", lambda name: object())
    gpu(9)
    assert chosen(on_cuda(72)) == "flash-3"
    gpu(10)
    assert chosen(on_cuda(72)) == "flash-4"


def test_cpu_takes_sdpa_and_reads_no_metadata(cases, install) -> None:
    module = install("doubling-attention", "doubling", DOUBLING)
    assert attention_backends.choose(cases["dense"][0]) is SDPA
    assert module not in sys.modules
    assert plugins.installed.cache_info().currsize == 0


def test_argument_decides_then_the_environment(draw, install, monkeypatch) -> None:
    install("doubling-attention", "doubling", DOUBLING)
    q, k = draw(5, 4, 8), draw(5, 2, 8)
    assert torch.equal(rope3d.attention(q, k, k, backend="doubling"), q * 2)
    monkeypatch.setenv("ROPE3D_ATTENTION", "doubling")
    assert torch.equal(rope3d.attention(q, k, k), q * 2)
    named = rope3d.attention(q, k, k, backend="reference")
    torch.testing.assert_close(named, rope3d.attention(q, k, k, backend="sdpa"))
    with pytest.raises(ValueError, match="doubling: head_dim above 64"):
        rope3d.attention(*(x.repeat(1, 1, 9) for x in (q, k, k)))
    with pytest.raises(ValueError, match=r"unknown attention backend 'fast'; known: .*doubling"):
        rope3d.attention(q, k, k, backend="fast")


def test_a_plug_in_that_gates_itself_comes_first_on_cuda(install, gpu, draw) -> None:
    install("doubling-attention", "doubling", DOUBLING)
    gpu(9)
    assert attention_backends.choose_gated(on_cuda(64)).name == "doubling"
    assert attention_backends.choose_gated(on_cuda(72)).name == "sdpa"
    q, k = draw(1, 5, 4, 8), draw(1, 5, 2, 8)
    text = rope3d.GatedText(k, k, torch.zeros(4))
    assert torch.equal(rope3d.attention(q, k, k, text=text, backend="doubling"), q * 6)


def test_a_plug_in_that_lacks_a_member_is_refused(install, draw) -> None:
    install("empty-attention", "empty", "BACKEND = 3")
    q = draw(5, 4, 8)
    with pytest.raises(ImportError, match="int lacks name, why_not, attend"):
        rope3d.attention(q, q, q, backend="empty")


def test_explain_tells_who_attends(install, gpu, draw) -> None:
    install("doubling-attention", "doubling", DOUBLING)
    install("broken-attention", "broken", "raise RuntimeError('no driver')")
    q, k = draw(5, 4, 8), draw(5, 2, 8)
    text = rope3d.GatedText(draw(1, 3, 2, 8), draw(1, 3, 2, 8), torch.zeros(4))
    said = rope3d.explain(q, k, k, rope3d.lumina(8), text=text)
    assert [part.splitlines()[0] for part in said.split("\n\n")] == [
        *("rotation", "attention", "gated attention to text")
    ]
    lines = {line.split()[0]: " ".join(line.split()) for line in said.split("\n\n")[1].splitlines()}
    assert lines["sdpa"] == "sdpa built in yes first in the order that serves this case"
    assert "would serve, but sdpa comes first" in lines["reference"]
    assert "not imported: q is on cpu" in lines["doubling"]
    with pytest.raises(ValueError, match="head_dim 12"):
        rope3d.explain(q, k, k, rope3d.lumina(12))
    gpu(9)
    with pytest.warns(RuntimeWarning, match="no driver"):
        said = attention_backends.explain(on_cuda(64), gated=True)
    lines = {line.split()[0]: " ".join(line.split()) for line in said.splitlines()}
    assert " yes " in lines["doubling"]
    assert "no driver" in lines["broken"]
    named = attention_backends.explain(on_cuda(64), "flash-varlen")
    assert " yes " not in named
    assert "it is for packed samples" in named


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gated_text_equals_the_sum_written_out(draw, packed, padded) -> None:
    lengths, words = (4, 4), (3, 5)
    q, k, v = draw(2, 4, 4, 16), draw(2, 4, 2, 16), draw(2, 4, 2, 16)
    keys, values, gate = draw(2, 5, 2, 16), draw(2, 5, 2, 16), draw(4)
    mask = torch.arange(5) < torch.tensor(words)[:, None]
    leaves = [x.requires_grad_() for x in (q, k, v, keys, values, gate)]
    scale = 16**-0.5
    answer = torch.stack(
        [
            exact(q[i], k[i], v[i], scale)
            + gate.double().tanh()[:, None] * exact(q[i], keys[i], values[i], scale, mask[i])
            for i in range(2)
        ]
    )
    if padded or not packed:
        text = rope3d.GatedText(keys, values, gate, mask=mask)
    else:
        text = rope3d.GatedText(keys[mask], values[mask], gate, lengths=words)
    if packed:
        tensors = [x.flatten(0, 1) for x in (q, k, v)]
        out = rope3d.attention(*tensors, lengths=lengths, text=text).unflatten(0, (2, 4))
    else:
        out = rope3d.attention(q, k, v, text=text)
    torch.testing.assert_close(out.double(), answer, atol=2e-6, rtol=0)
    weights = draw(2, 4, 4, 16)
    mine = torch.autograd.grad(out, leaves, weights)
    theirs = torch.autograd.grad(answer, leaves, weights.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_text_sees_rotated_queries_and_its_own_scale(draw) -> None:
    rope, positions = rope3d.lumina(16), rope3d.grid(height=2, width=3)
    q, k, v = draw(1, 6, 4, 16), draw(1, 6, 2, 16), draw(1, 6, 2, 16)
    text = rope3d.GatedText(draw(1, 5, 2, 16), draw(1, 5, 2, 16), draw(4))
    out = rope3d.attention(
        q, k, v, rope, positions, text=text, scale="proportional", trained_tokens=3
    )
    turned, turned_k = rope3d.apply(q, k, rope, positions)
    alone = rope3d.attention(turned, turned_k, v, scale="proportional", trained_tokens=3)
    second = exact(turned[0], text.keys[0], text.values[0], 0.25)
    expected = alone[0].double() + text.gate.double().tanh()[:, None] * second
    torch.testing.assert_close(out[0].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3)}, r"gate has shape \(3,\); expected \[4\]"),
        ({"values": torch.zeros(2, 5, 2, 8)}, "values of 16 channels"),
        ({"keys": torch.zeros(3, 5, 2, 16), "values": torch.zeros(3, 5, 2, 16)}, "text: .*same ba"),
        ({"keys": torch.zeros(10, 2, 16), "values": torch.zeros(10, 2, 16)}, "without lengths"),
        ({"lengths": (5, 5)}, "without lengths"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "text: key_mask"),
    ],
)
def test_text_that_does_not_fit(change, message) -> None:
    q = torch.zeros(2, 4, 4, 16)
    keys = torch.zeros(2, 5, 2, 16)
    given = {"keys": keys, "values": keys, "gate": torch.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        rope3d.attention(q, q, q, text=rope3d.GatedText(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; expected a positive number"),
        ({"scale": -1.0}, "positive"),
        ({"scale": float("inf")}, "positive"),
        ({"scale": torch.ones(3)}, r"expected a number, or floating point \[2\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "end at the 8 tokens of q"),
        ({"cu_seqlens": torch.tensor([1, 4, 8])}, "begin at 0"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 8])}, "never decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "expected integers"),
    ],
)
def test_numbers_that_do_not_fit(given, message) -> None:
    q = torch.zeros(8, 4, 16)
    lengths = {} if "cu_seqlens" in given else {"lengths": (4, 4)}
    with pytest.raises(ValueError, match=message):
        rope3d.attention(q, q, q, **lengths, **given)


def test_one_dtype_and_one_device() -> None:
    q = torch.zeros(8, 4, 16)
    with pytest.raises(ValueError, match=r"q is torch\.float32 on cpu, k torch\.float16"):
        rope3d.attention(q, q.half(), q)


def test_under_autocast_all_are_cast_as_pytorch_has_it(draw) -> None:
    q, k, v = draw(1, 5, 4, 16), draw(1, 5, 2, 16), draw(1, 5, 2, 16).bfloat16()
    text = rope3d.GatedText(draw(1, 3, 2, 16), draw(1, 3, 2, 16), draw(4))
    with torch.autocast("cpu", torch.bfloat16):
        out = rope3d.attention(q, k, v, text=text)
        plain = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.float().transpose(1, 2), enable_gqa=True
        )
    assert out.dtype == plain.dtype == torch.bfloat16
    alone = rope3d.attention(q.bfloat16(), k.bfloat16(), v)
    torch.testing.assert_close(alone, plain.transpose(1, 2))


def test_compiles_whole_with_text_and_scale_per_sample(draw) -> None:
    q, k, v = draw(7, 4, 16), draw(7, 2, 16), draw(7, 2, 16)
    text = (draw(2, 5, 2, 16), draw(2, 5, 2, 16), draw(4))

    def attend(q, k, v, scale, keys, values, gate):
        text = rope3d.GatedText(keys, values, gate)
        return rope3d.attention(q, k, v, lengths=(4, 3), scale=scale, text=text)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for scale in (torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.5])):
        ours = compiled(q, k, v, scale, *text)
        torch.testing.assert_close(ours, attend(q, k, v, scale, *text))
