from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextdit_core import UserError
from nextdit_core.training.draws import draw, time_shift
from nextdit_core.training.plan import batches_from, epoch_plan, rank_slice

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


@given(LENGTHS, st.integers(40, 200), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_sees_every_sample_once_within_the_budget(
    lengths: list[int], budget: int, seed: int, epoch: int
) -> None:
    plan = epoch_plan(lengths, budget, seed, epoch)
    assert sorted(itertools.chain(*plan)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for batch in plan)
    assert plan == epoch_plan(lengths, budget, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    plans = [epoch_plan([4] * 50, 16, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(plans, 2))


@given(st.integers(0, 30))
@settings(deadline=None)
def test_walking_from_a_position_continues_the_walk_from_the_start(steps: int) -> None:
    lengths = [3, 5, 5, 2, 7] * 4
    whole = list(itertools.islice(batches_from(lengths, 16, 0, 0, 0), 40))
    epoch, index, _ = whole[steps]
    rest = list(itertools.islice(batches_from(lengths, 16, 0, epoch, index), 5))
    assert rest == whole[steps : steps + 5]


@given(st.integers(1, 9), st.integers(0, 20))
def test_ranks_share_a_batch_without_loss(world: int, size: int) -> None:
    batch = tuple(range(size))
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == list(batch)


def test_a_sample_above_the_budget_is_named() -> None:
    with pytest.raises(UserError, match=r"sample 1 has 20 tokens.*at least 20"):
        epoch_plan([4, 20], 16, 0, 0)


def test_draws_depend_on_seed_epoch_and_sample_only() -> None:
    one, again = draw(0, 1, 2, (3, 2)), draw(0, 1, 2, (3, 2))
    assert one.t == again.t
    assert torch.equal(one.noise, again.noise)
    others = [draw(1, 1, 2, (3, 2)), draw(0, 2, 2, (3, 2)), draw(0, 1, 3, (3, 2))]
    assert all(not torch.equal(one.noise, other.noise) for other in others)


def test_times_and_dropout_have_the_distribution_that_was_asked_for() -> None:
    draws = [draw(0, 0, i, (1, 1), caption_dropout=0.25) for i in range(4000)]
    times = torch.tensor([d.t for d in draws])
    assert abs(float(times.mean()) - 0.5) < 0.02
    assert abs(float(times.var()) - 1 / 12) < 0.005
    assert abs(sum(d.drop_caption for d in draws) / 4000 - 0.25) < 0.03
    lognorm = torch.tensor(
        [draw(0, 0, i, (1, 1), time_distribution="lognorm").t for i in range(4000)]
    )
    assert abs(float(torch.logit(lognorm).std()) - 1) < 0.04
    noise = torch.stack([d.noise for d in draws])
    assert abs(float(noise.std()) - 1) < 0.04


def test_training_times_move_towards_noise_with_the_number_of_tokens() -> None:
    """A uniform u goes to u / (s + u - s u): s = 2 at four times the tokens, e^mu for Flux."""
    plain = [draw(0, 0, i, (1024, 1)).t for i in range(500)]
    for name, factor in (("sd3:256", 2.0), ("shift:3", 3.0), ("flux", math.exp(0.63))):
        moved = [draw(0, 0, i, (1024, 1), shift=name).t for i in range(500)]
        expected = [u / (factor + u - factor * u) for u in plain]
        assert moved == pytest.approx(expected, rel=1e-9), name
    # 0.63 is on the line from 0.5 at 256 tokens to 1.15 at 4096.
    assert pytest.approx(0.63) == 0.5 + (1024 - 256) * 0.65 / 3840
    small, large = (draw(0, 0, 1, (n, 1), shift="sd3:256").t for n in (256, 4096))
    assert small == pytest.approx(draw(0, 0, 1, (256, 1)).t)
    assert large < small


@pytest.mark.parametrize("name", ["sd3", "sd3:x", "sd3:0", "shfit:3", ""])
def test_time_shifts_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="time_shift is"):
        time_shift(name, 64)
