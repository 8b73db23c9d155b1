"""Attention against a float64 softmax written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope3d


def written_out(q, k, v, scale=None, mask=None):
    """One sample: q [T, H, D], k and v [S, Hkv, D], mask [S]."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    keep = torch.ones(k.shape[0], dtype=torch.bool) if mask is None else mask
    if not keep.any():
        return out
    for head in range(q.shape[1]):
        key_head = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[keep, key_head].T * (scale or q.shape[2] ** -0.5)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out[:, head] = weights @ v[keep, key_head]
    return out


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, keys=None, *, batch=(), heads=4, kv_heads=2, dtype=torch.float32):
        shapes = ((tokens, heads, 8), (keys or tokens, kv_heads, 8), (keys or tokens, kv_heads, 6))
        return [torch.randn(*batch, *shape, generator=generator).to(dtype) for shape in shapes]

    return draw


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
def test_equals_softmax_written_out(qkv, kv_heads, dtype, tolerance) -> None:
    q, k, v = qkv(5, 9, batch=(2,), kv_heads=kv_heads, dtype=dtype)
    out = rope3d.attention(q, k, v)
    assert out.dtype == dtype
    for row in range(2):
        expected = written_out(q[row], k[row], v[row])
        torch.testing.assert_close(out[row].double(), expected, atol=tolerance, rtol=tolerance)


def test_mask_leaves_keys_out_and_rows_without_keys_are_zero(qkv) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(5, 9, batch=(3,)))
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, ::2] = True
    mask[1] = True
    out = rope3d.attention(q, k, v, key_mask=mask)
    for row in range(3):
        expected = written_out(q[row], k[row], v[row], mask=mask[row]).float()
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert torch.equal(x.grad[2], torch.zeros_like(x.grad[2]))
    assert torch.equal(k.grad[0, 1::2], torch.zeros_like(k.grad[0, 1::2]))


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), proportional=st.booleans())
def test_packed_batch_equals_samples_alone(lengths, proportional) -> None:
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 8)
    options = {"scale": "proportional", "trained_tokens": 3} if proportional else {}
    packed = rope3d.attention(q, k, v, lengths=lengths, **options)
    alone = [
        rope3d.attention(*(x[None] for x in sample), **options)[0]
        for sample in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    assert torch.equal(rope3d.attention(q, k, v, cu_seqlens=cu_seqlens, **options), packed)


def test_packed_keys_of_other_lengths(qkv) -> None:
    q, k, v = qkv(6, 7)
    out = rope3d.attention(q, k, v, lengths=(2, 3, 1), key_lengths=(4, 0, 3))
    torch.testing.assert_close(out[:2], written_out(q[:2], k[:4], v[:4]).float())
    assert torch.equal(out[2:5], torch.zeros(3, 4, 6))
    torch.testing.assert_close(out[5:], written_out(q[5:], k[4:], v[4:]).float())


def test_packed_without_lengths_is_one_sample(qkv) -> None:
    q, k, v = qkv(4, 6)
    torch.testing.assert_close(rope3d.attention(q, k, v), written_out(q, k, v).float())


def test_empty_batches_keep_their_shape() -> None:
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    assert rope3d.attention(q, k, k, lengths=()).shape == (0, 4, 8)
    assert rope3d.attention(q[None], k[None], k[None]).shape == (1, 0, 4, 8)
    assert torch.equal(
        rope3d.attention(torch.ones(1, 3, 4, 8), k[None], k[None]), torch.zeros(1, 3, 4, 8)
    )


def test_proportional_scale_counts_the_keys_of_each_sample(qkv) -> None:
    q, k, v = qkv(5, 9, batch=(2,))
    lengths = (4, 9)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    out = rope3d.attention(q, k, v, key_mask=mask, scale="proportional", trained_tokens=4)
    for row, keys in enumerate(lengths):
        scale = math.sqrt(math.log(keys) / math.log(4) / 8)
        expected = written_out(q[row], k[row], v[row], scale, mask[row]).float()
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)
        alone = rope3d.attention(
            q[row], k[row, :keys], v[row, :keys], scale="proportional", trained_tokens=4
        )
        torch.testing.assert_close(out[row], alone)
    plain = rope3d.attention(q[:1], k[:1], v[:1], key_mask=mask[:1])
    torch.testing.assert_close(out[:1], plain)  # at the trained length nothing changes


def test_a_number_scales_the_scores(qkv) -> None:
    q, k, v = qkv(5)
    torch.testing.assert_close(
        rope3d.attention(q, k, v, scale=0.7), written_out(q, k, v, 0.7).float()
    )


def test_rope_and_positions_rotate_first(qkv) -> None:
    q, k, v = qkv(7)
    rope = rope3d.lumina(8)
    positions, cu_seqlens = rope3d.pack(
        [rope3d.grid(height=2, width=2), rope3d.grid(height=1, width=3)]
    )
    turned = rope3d.apply(q, k, rope, positions)
    out = rope3d.attention(q, k, v, rope, positions, cu_seqlens=cu_seqlens)
    assert torch.equal(out, rope3d.attention(*turned, v, lengths=(4, 3)))
    far = rope3d.attention(q, k, v, rope, positions + 40, lengths=(4, 3))
    torch.testing.assert_close(out, far, atol=1e-5, rtol=1e-5)


def test_gradients_in_float64() -> None:
    q = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *qkv: rope3d.attention(*qkv, lengths=(2, 2, 1)), (q, k, v)
    )


def test_compiles_whole_dense_masked_and_packed(qkv) -> None:
    torch._dynamo.reset()
    rope, positions = rope3d.lumina(8), torch.randn(7, 2)
    compiled = torch.compile(rope3d.attention, backend="eager", fullgraph=True)
    dense, packed = qkv(7, batch=(2,)), qkv(7)
    mask = torch.rand(2, 7) > 0.5
    for tensors, options in (
        (dense, {"key_mask": mask, "scale": "proportional", "trained_tokens": 4}),
        (packed, {"lengths": (3, 2, 2)}),
    ):
        expected = rope3d.attention(*tensors, rope, positions, **options)
        ours = compiled(*tensors, rope, positions, **options)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (3,)}, "sum to the 5 packed tokens"),
        ({"lengths": (6, -1)}, "at least 0"),
        ({"lengths": (5,), "key_lengths": (2, 3)}, "one number per sample in both"),
        ({"lengths": (5,), "cu_seqlens": torch.tensor([0, 5])}, "give one of them"),
        ({"key_mask": torch.ones(5, 5, dtype=torch.bool)}, "key_mask is for dense"),
        ({"scale": "proportional"}, "trained_tokens is None"),
        ({"scale": "proportional", "trained_tokens": 1}, "at least 2"),
        ({"scale": "large"}, "expected a number, 'proportional' or None"),
        ({"trained_tokens": 64}, "no effect"),
        ({"rope": rope3d.lumina(8)}, "belong together"),
    ],
)
def test_errors_of_packed_calls(qkv, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        rope3d.attention(*qkv(5), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (5, 5)}, "which is dense"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, r"expected bool \[2, 5\]"),
        ({"key_mask": torch.ones(2, 5)}, "True = attend"),
    ],
)
def test_errors_of_dense_calls(qkv, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        rope3d.attention(*qkv(5, batch=(2,)), **options)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((5, 8), (5, 8), (5, 8), "transpose"),
        ((5, 4, 8), (5, 2, 8), (4, 2, 8), "same keys and heads"),
        ((5, 4, 8), (5, 2, 6), (5, 2, 6), "same batch and head_dim"),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8), "multiple of kv_heads"),
    ],
)
def test_errors_of_shapes(q, k, v, message) -> None:
    with pytest.raises(ValueError, match=message):
        rope3d.attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
