from __future__ import annotations

from typing import Any

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


def test_stacked_lengths_stay_known_on_the_host() -> None:
    known = Conditioning(torch.ones(2, 4, 2), torch.tensor([4, 1]))
    assert known.host_lengths == (4, 1)
    given = Conditioning(
        torch.ones(1, 3, 2, device="meta"), torch.ones(1, device="meta").long(), host_lengths=(3,)
    )
    assert Conditioning.stack([known, known]).host_lengths == (4, 1, 4, 1)
    assert Conditioning.stack([given, given]).host_lengths == (3, 3)
    unknown = Conditioning(given.text, given.lengths)
    assert Conditioning.stack([given, unknown]).host_lengths is None


def test_lengths_on_a_device_are_not_waited_for() -> None:
    """Reading from the meta device, which has no numbers, would be an error."""
    lengths = torch.zeros(2, dtype=torch.int64, device="meta")
    assert Conditioning(torch.ones(2, 4, 2, device="meta"), lengths).host_lengths is None
    with pytest.raises(NotImplementedError):
        lengths.tolist()


def test_a_compiled_function_may_make_a_condition() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def pooled(text: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return Conditioning(text, lengths).pooled()

    text = torch.arange(6.0).view(1, 3, 2)
    assert pooled(text, torch.tensor([2])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("lengths", "known", "message"),
    [
        ([3, 0], None, r"lengths are \(3, 0\); expected 2, each in \[1, 4\]; a sample without"),
        ([3, 5], None, r"lengths are \(3, 5\)"),
        ([3, 1], (3, 2), r"lengths are \(3, 1\) and host_lengths \(3, 2\); expected the same"),
        ([True, False], None, "lengths are torch.bool; expected whole numbers"),
        ([3.0, 1.0], None, "lengths are torch.float32; expected whole numbers"),
        ([[3, 1]], None, r"lengths have shape \(1, 2\); expected \[2\]"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    lengths: list[Any], known: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Conditioning(torch.ones(2, 4, 2), torch.tensor(lengths), None, known)


@pytest.mark.parametrize("known", [(3, 0), (5, 1), (3,)])
def test_lengths_known_on_the_host_only_are_checked_too(known: tuple[int, ...]) -> None:
    text, lengths = torch.ones(2, 4, 2, device="meta"), torch.ones(2, device="meta").long()
    with pytest.raises(ValueError, match=r"lengths are \(\d.*; expected 2, each in \[1, 4\]"):
        Conditioning(text, lengths, host_lengths=known)


def test_an_extra_vector_is_for_all_or_none() -> None:
    one = Conditioning(torch.ones(1, 2, 2), torch.tensor([2]))
    two = Conditioning(torch.ones(1, 2, 2), torch.tensor([2]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="extra"):
        Conditioning.stack([one, two])
