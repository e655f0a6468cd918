"""The alternating descent behind BLAST: Gram matrices are those of the dense bases, and no round raises the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.core.blockfit import MANY, BlockFit, Blocks, _Descent, _grams, _own_grams, _Problem, _solved
from compresskit.core.metric import Moment
from compresskit.testing.cases import normal


def moment(kind, n, seed):
    x = normal(2 * n, n, seed=seed)
    return Moment({"identity": None, "diagonal": x[0].square(), "full": x.T @ x}[kind])


def dense(moment, n):
    values = moment.values
    return torch.eye(n, dtype=torch.float64) if values is None else torch.diag(values) if values.dim() == 1 else values


@pytest.mark.parametrize("kind", ["identity", "full"])
def test_gram_matrices_are_those_of_the_bases(kind):
    bases, scales = normal(3, 4, 5, seed=1), normal(2, 3, 5, seed=2)
    metric = moment(kind, 12, 3)
    full = dense(metric, 12)
    own = _own_grams(bases, metric)
    for j, gram in enumerate(own):
        part = slice(4 * j, 4 * j + 4)
        torch.testing.assert_close(gram, bases[j].T @ full[part, part] @ bases[j])
    for gram, row in zip(_grams(own, scales), scales, strict=True):
        parts = (scale[:, None] * part * scale for part, scale in zip(own, row, strict=True))
        torch.testing.assert_close(gram, sum(parts))


KINDS = st.sampled_from(["identity", "diagonal", "full"])


@settings(max_examples=40, deadline=None)
@given(KINDS, KINDS, st.sampled_from([(3, 2), (1, 4), (4, 1), (4, 4)]), st.integers(1, 6), st.integers(0, 99))
def test_no_round_raises_the_error_and_it_is_the_one_that_is_said(rows, cols, blocks, rank, seed):
    check(rows, cols, blocks, rank, seed, (12, 8))


@settings(max_examples=20, deadline=None)
@given(KINDS, KINDS, st.integers(1, 3), st.integers(0, 99))
def test_the_same_of_tall_weights(rows, cols, rank, seed):
    check(rows, cols, (2, 2), rank, seed, (16, 4))


def check(rows, cols, blocks, rank, seed, shape):
    (p, q), (m, n), weight = blocks, shape, normal(*shape, seed=seed)
    left, right = moment(rows, m, seed + 1), moment(cols, n, seed + 2)
    start = Blocks(
        normal(p, m // p, rank, seed=seed + 3),
        normal(p, q, rank, seed=seed + 4),
        normal(q, n // q, rank, seed=seed + 5),
    )
    fit = BlockFit(weight, blocks, left, right)
    errors = []
    for rounds in range(4):
        difference = weight - fit.refine(start, rounds).dense()
        errors.append(float((difference * left.before(right.after(difference))).sum()))
        said = fit.error(start, rounds)
        tall = m > p * n and rows != "full"
        assert errors[-1] <= said * (1 + 1e-6) if tall else errors[-1] == pytest.approx(said, rel=1e-6, abs=1e-9)
        least = errors[-1] if tall else min(errors)  # its left bases are solved for once more
        assert errors[-1] <= least * (1 + 1e-9)
    assert errors[-1] < errors[0]


def test_a_zero_weight_and_zero_factors_stay_finite():
    zeros = Blocks(torch.zeros(2, 4, 3), torch.zeros(2, 2, 3), torch.zeros(2, 4, 3))
    fit = BlockFit(torch.zeros(8, 8), (2, 2), Moment(None), Moment(None))
    assert not fit.refine(zeros, 2).dense().any()
    assert fit.error(zeros, 2) == 0


@pytest.mark.parametrize(("rows", "cols"), [("identity", "identity"), ("identity", "full"), ("full", "full")])
def test_each_step_goes_as_far_as_pays_and_knows_the_error_that_is_left(rows, cols):
    problem = _Problem.of(normal(32, 144), moment(rows, 32, 8), moment(cols, 144, 9))
    here = _Descent(problem, Blocks(normal(2, 16, 3, seed=2), normal(2, 2, 3, seed=3), normal(2, 72, 3, seed=4)))
    for step in (here.scales_step, here.right_step, here.left_step):
        before = here.blocks
        step()
        assert here.error == pytest.approx(_Descent(problem, here.blocks).error, rel=1e-9)
        for length in (-0.01, 0.01):
            assert _Descent(problem, here.blocks.beyond(before, length)).error >= here.error * (1 - 1e-12)


def test_many_right_hand_sides_are_solved_for_as_few_are():
    roots = normal(3, 5, 8)
    grams, sides = roots @ roots.mT, normal(3, 5, MANY, seed=2)
    torch.testing.assert_close(_solved(grams, sides)[..., :4], _solved(grams, sides[..., :4]))
