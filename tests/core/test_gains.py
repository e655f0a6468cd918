"""Expected gains: those of full fits where few ranks are asked for, else from a few short ones, smooth and cautious."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.core.gains import ANCHORS, FEW_RANKS, FULL_ROUNDS, SHORT_ROUNDS, Gains

TOP = 200


def fits(power, size, asked=None):
    """Shares that are left after fits whose gain is a power of the rank, and half of it in short ones."""

    def at(rank, rounds):
        if asked is not None:
            asked.append((rank, rounds))
        return math.exp(-size * (rank / TOP) ** power * (0.5 if rounds < FULL_ROUNDS else 1))

    return at


@given(st.floats(0.6, 2.5), st.floats(0.1, 1.5), st.booleans(), st.integers(1, TOP - 1))
def test_more_rank_leaves_less_and_short_fits_promise_no_less_than_they_found(power, size, short, rank):
    at = fits(power, size)
    gains = Gains(TOP, FULL_ROUNDS, short, at)
    assert 0 < gains.share(rank + 1) <= gains.share(rank) * (1 + 1e-12) <= 1 + 1e-12
    if short and rank >= ANCHORS[0] * TOP:
        assert gains.share(rank) <= at(rank, SHORT_ROUNDS) ** (1 - 0.03)
    if not short:
        assert at(rank, FULL_ROUNDS) * (1 - 1e-9) <= gains.share(rank) <= at(rank, FULL_ROUNDS) ** (1 - 0.031)


@pytest.mark.parametrize("short", [False, True])
def test_few_ranks_are_fitted_for_all(short):
    asked = []
    gains = Gains(TOP, FULL_ROUNDS, short, fits(1.5, 0.5, asked))
    for rank in range(1, TOP + 1):
        gains.share(rank)
    assert len(dict.fromkeys(asked)) < 8
    assert {rounds for _, rounds in asked} == ({SHORT_ROUNDS - 1, SHORT_ROUNDS} if short else {FULL_ROUNDS})


def test_small_weights_are_fitted_rank_by_rank_in_full():
    asked = []
    gains = Gains(FEW_RANKS, FULL_ROUNDS, True, fits(1.5, 0.5, asked))
    assert [gains.share(rank) for rank in (3, 20)] == [fits(1.5, 0.5)(rank, FULL_ROUNDS) for rank in (3, 20)]
    assert asked == [(3, FULL_ROUNDS), (20, FULL_ROUNDS)]


@pytest.mark.parametrize("rounds", [0, 2, SHORT_ROUNDS])
def test_nothing_more_is_expected_where_no_more_rounds_are_made(rounds):
    at = fits(1.5, 0.5)
    assert Gains(TOP, rounds, True, at).share(TOP) == pytest.approx(at(TOP, rounds))
