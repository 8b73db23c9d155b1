"""Which samples make up each step, as a pure function of seed, epoch and lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from nextdit_core.errors import UserError
from nextdit_core.training.draws import generator

__all__ = ["Batch", "batches_from", "epoch_plan", "micro_batches", "rank_slice"]

#: Sample indices of one global batch.
Batch = tuple[int, ...]


def epoch_plan(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[Batch]:
    """Plan one epoch: every sample once, at most `batch_tokens` tokens in a batch.

    Samples of one length are put together, so that most batches are dense; what is left over
    of each length shares batches at the end. Then the batches are shuffled. Neither the
    number of workers nor the place where a run was resumed enters.

    Args:
        lengths: Tokens of every sample.
        batch_tokens: Budget of one global batch, in tokens.
        seed: The run's seed.
        epoch: From 0.

    Returns:
        The batches in order.

    Raises:
        UserError: A sample is larger than the budget.

    >>> sorted(sum(epoch_plan([4] * 10, 16, seed=0, epoch=0), ()))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    longest = max(lengths)
    if longest > batch_tokens:
        raise UserError(
            f"sample {lengths.index(longest)} has {longest} tokens, more than batch_tokens "
            f"{batch_tokens}; set batch_tokens to at least {longest}"
        )
    source = generator(seed, "plan", epoch)
    order = torch.randperm(len(lengths), generator=source).tolist()
    groups: dict[int, list[int]] = defaultdict(list)
    for index in order:
        groups[lengths[index]].append(index)
    batches: list[Batch] = []
    rest: list[int] = []
    for length in sorted(groups):
        group, size = groups[length], batch_tokens // length
        whole = len(group) // size * size
        batches += [tuple(group[i : i + size]) for i in range(0, whole, size)]
        rest += group[whole:]
    batches += _fill(rest, lengths, batch_tokens)
    shuffled = torch.randperm(len(batches), generator=source).tolist()
    return [batches[i] for i in shuffled]


def _fill(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[Batch]:
    """Cut a list into batches wherever the next sample would exceed the budget."""
    batches: list[Batch] = []
    current: list[int] = []
    used = 0
    for index in indices:
        if current and used + lengths[index] > budget:
            batches.append(tuple(current))
            current = []
            used = 0
        current.append(index)
        used += lengths[index]
    return [*batches, tuple(current)] if current else batches


def batches_from(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int, index: int
) -> Iterator[tuple[int, int, Batch]]:
    """Walk the plan without end from a position in it.

    Args:
        lengths: Tokens of every sample.
        batch_tokens: Budget of one global batch.
        seed: The run's seed.
        epoch: Where to begin.
        index: The batch of that epoch to begin with.

    Yields:
        Epoch, index of the batch in its epoch, and the batch.
    """
    while True:
        batches = epoch_plan(lengths, batch_tokens, seed, epoch)
        for position in range(index, len(batches)):
            yield epoch, position, batches[position]
        epoch, index = epoch + 1, 0


def rank_slice(batch: Batch, rank: int, world_size: int) -> Batch:
    """Give one rank its part of a global batch; empty where samples are fewer than ranks."""
    return batch[rank::world_size]


def micro_batches(indices: Sequence[int], lengths: Sequence[int], most: int | None) -> list[Batch]:
    """Cut a worker's share of a batch into parts that fit its memory.

    Args:
        indices: Samples, in order.
        lengths: Tokens of every sample of the data.
        most: Tokens in one part; a longer sample is a part of its own. None does not cut.

    Returns:
        At least one part, in order.

    >>> micro_batches([0, 1, 2], [3, 3, 3], 6)
    [(0, 1), (2,)]
    """
    return [tuple(indices)] if most is None else _fill(indices, lengths, most)
