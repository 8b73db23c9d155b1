"""Attention as two bfloat16 products, and keys left out without a mask, on the CPU."""

import pytest
import torch
from torch.nn import functional

import rope3d
from rope3d import attend_products, attention_backends
from rope3d.softmax_attention import case_of


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.fixture
def small(monkeypatch):
    """Products of any size, in blocks that do not divide anything."""
    monkeypatch.setattr(attend_products, "_FEW", 0)
    monkeypatch.setattr(attend_products, "_BLOCK", 700)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def exact(q, k, v, **options) -> torch.Tensor:
    wide = (x.double() for x in (q, k, v))
    return rope3d.attention(*wide, backend="reference", **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (72, 72), (72, 40)])
def test_products_err_as_bfloat16_does(draw, small, heads, kv_heads, head_dim, value_dim) -> None:
    q, k, v = (
        draw(2, tokens, own, size).bfloat16()
        for tokens, own, size in (
            (37, heads, head_dim),
            (53, kv_heads, head_dim),
            (53, kv_heads, value_dim),
        )
    )
    expected = exact(q, k, v)
    found = rope3d.attention(q, k, v, backend="products")
    other = rope3d.attention(q, k, v, backend="sdpa")
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 37, heads, value_dim)
    # What rounding q, k and v to bfloat16 does to the result; the scores' rounding is of that size.
    shaken = [x.double() * (1 + 2**-9 * draw(*x.shape).double()) for x in (q, k, v)]
    inherent = rms(exact(*shaken) - expected)
    assert rms(found - expected) <= 2 * inherent
    assert rms(found - expected) <= 3 * rms(other - expected)


def test_products_of_packed_samples_with_their_own_scales(draw, small) -> None:
    q, k, v = (draw(90, own, 64).bfloat16() for own in (4, 2, 2))
    options = {"lengths": (40, 0, 30, 20), "scale": "proportional", "trained_tokens": 16}
    found = rope3d.attention(q, k, v, backend="products", **options)
    torch.testing.assert_close(found.double(), exact(q, k, v, **options), atol=0.03, rtol=0.03)
    scale = torch.tensor([0.1, 0.2])
    rows = [x.unflatten(0, (2, 45)) for x in (q, k, v)]
    found = rope3d.attention(*rows, backend="products", scale=scale)
    torch.testing.assert_close(found.double(), exact(*rows, scale=scale), atol=0.03, rtol=0.03)


def test_products_leave_their_inputs_alone_and_take_any_strides(draw, small) -> None:
    q, k, v = (draw(2, own, 33, 64).bfloat16().transpose(1, 2) for own in (4, 2, 2))
    before = [x.clone() for x in (q, k, v)]
    found = rope3d.attention(q, k, v, backend="products")
    straight = rope3d.attention(*(x.contiguous() for x in (q, k, v)), backend="products")
    torch.testing.assert_close(found, straight, atol=0, rtol=0)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    still = q[:, :1].expand(-1, 33, -1, -1)
    alike = rope3d.attention(still, k, v, backend="products")
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), atol=0, rtol=0)


def test_products_are_chosen_where_they_pay(draw, monkeypatch) -> None:
    q = draw(1, 40, 4, 64)
    for pays, dtype, rounded, expected in (
        (True, torch.bfloat16, True, "products"),
        (True, torch.bfloat16, False, "sdpa"),
        (True, torch.float32, True, "sdpa"),
        (False, torch.bfloat16, True, "sdpa"),
    ):
        monkeypatch.setattr(attention_backends, "_products_pay", lambda pays=pays: pays)
        given = [q.to(dtype)] * 3
        case = case_of(*given, rounded_scores=rounded)
        assert attention_backends.choose(case).name == expected
        table = rope3d.explain(*given, rounded_scores=rounded).splitlines()
        assert next(line.split()[0] for line in table if " yes " in line) == expected
    case = case_of(*(q.bfloat16().requires_grad_() for _ in range(3)))
    with pytest.raises(ValueError, match="gradients are recorded"):
        attention_backends.choose(case, "products")
    with torch.no_grad():
        assert attention_backends.choose(case, "products").name == "products"
    with pytest.raises(ValueError, match=r"torch.float16 on cpu; it takes bfloat16"):
        attention_backends.choose(case_of(*(q.half() for _ in range(3))), "products")


def test_the_text_may_be_rounded_where_the_rest_may(draw, small, monkeypatch) -> None:
    monkeypatch.setattr(attention_backends, "_products_pay", lambda: True)
    q, k, v = (draw(2, 20, 2, 64).bfloat16() for _ in range(3))
    text = rope3d.GatedText(k[:, :9], v[:, :9], torch.ones(2).bfloat16())
    found = rope3d.attention(q, k, v, text=text, rounded_scores=True)
    named = rope3d.attention(q, k, v, text=text, backend="products")
    assert torch.equal(found, named)
    assert not torch.equal(found, rope3d.attention(q, k, v, text=text))


@pytest.mark.parametrize("known", [{}, {"avx512_bf16": True, "amx_bf16": True}, {"avx2": True}])
def test_processors_that_stay_with_sdpa(known, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    attend_products.pays_here.cache_clear()
    assert not attend_products.pays_here()
    attend_products.pays_here.cache_clear()


def test_few_scores_go_to_sdpa(draw, monkeypatch) -> None:
    q, k, v = (draw(1, 9, 2, 64).bfloat16() for _ in range(3))
    found = rope3d.attention(q, k, v, backend="products")
    assert torch.equal(found, rope3d.attention(q, k, v, backend="sdpa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "products"])
def test_masks_become_shorter_keys(draw, small, dtype, backend, monkeypatch) -> None:
    if backend == "products" and dtype == torch.float32:
        pytest.skip("products are for bfloat16")
    q, k, v = (draw(4, tokens, 2, 64).to(dtype) for tokens in (21, 17, 17))
    mask = torch.arange(17) < torch.tensor([17, 9, 0, 0])[:, None]
    mask[3, ::3] = True
    masks = []

    def watched(*args, attn_mask, **options):
        masks.append(attn_mask)
        return functional.scaled_dot_product_attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr("rope3d.attend_sdpa.scaled_dot_product_attention", watched)
    found = rope3d.attention(q, k, v, key_mask=mask, backend=backend)
    # Only the sample without keys keeps its mask, so that it has gradients, which are 0.
    assert [m for m in masks if m is not None and not m.all()] == []
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    expected = exact(q, k, v, key_mask=mask)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[2], torch.zeros_like(found[2]))


def test_no_key_at_all_still_has_gradients(draw) -> None:
    q, k, v = (draw(2, 5, 2, 8).requires_grad_() for _ in range(3))
    out = rope3d.attention(q, k, v, key_mask=torch.zeros(2, 5, dtype=torch.bool))
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own, of vmap
def test_masks_under_vmap_and_compile_stay_masks(draw) -> None:
    q, k, v = (draw(3, 1, 5, 2, 8) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None, None]

    def attend(q, k, v, mask):
        return rope3d.attention(q, k, v, key_mask=mask)

    expected = torch.stack([attend(*row) for row in zip(q, k, v, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(q, k, v, mask), expected)
    whole = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(q[1], k[1], v[1], mask[1]), expected[1])
