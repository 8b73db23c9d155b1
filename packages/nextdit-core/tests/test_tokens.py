from __future__ import annotations

import pytest
import torch

from nextdit_core import Conditioning, Tokens


def _tokens(length: int, value: float = 0.0) -> Tokens:
    return Tokens(torch.full((length, 2), value), torch.zeros(length, 3), (length,))


def test_pack_and_split_are_inverse() -> None:
    packed = Tokens.pack([_tokens(3, 1.0), _tokens(5, 2.0)])
    assert packed.cu_seqlens.tolist() == [0, 3, 8]
    assert packed.equal_length is None
    assert [part.unique().tolist() for part in packed.split()] == [[1.0], [2.0]]


def test_equal_lengths_are_known() -> None:
    packed = Tokens.pack([_tokens(4), _tokens(4)])
    assert (packed.batch, packed.equal_length) == (2, 4)


@pytest.mark.parametrize(
    ("values", "positions", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 3), "values have shape"),
        (torch.zeros(4, 2), torch.zeros(4, 2), "positions have shape"),
    ],
)
def test_parts_that_disagree_are_refused(
    values: torch.Tensor, positions: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokens(values, positions, (4,))


def test_packing_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        Tokens.pack([])


def test_pooling_averages_real_text_only() -> None:
    text = torch.tensor([[[1.0], [3.0], [100.0]], [[7.0], [100.0], [100.0]]])
    pooled = Conditioning(text, torch.tensor([2, 1])).pooled()
    assert pooled.tolist() == [[2.0], [7.0]]


def test_stack_fills_up_to_the_longest_text() -> None:
    parts = [Conditioning(torch.ones(1, n, 2), torch.tensor([n])) for n in (2, 5)]
    stacked = Conditioning.stack(parts)
    assert stacked.text.shape == (2, 5, 2)
    assert stacked.mask.sum(1).tolist() == [2, 5]


def test_an_extra_vector_is_for_all_or_none() -> None:
    one = Conditioning(torch.ones(1, 2, 2), torch.tensor([2]))
    two = Conditioning(torch.ones(1, 2, 2), torch.tensor([2]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="extra"):
        Conditioning.stack([one, two])
