"""Weighted Kronecker sums: each half step is the least-squares solution, the error that it reports is the true one and
never rises, and conjugate gradients reach the same where the moment of the rows is no product."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.core import kron_refine
from compresskit.core.grids import Grid, cut, uncut
from compresskit.core.importance import Importance
from compresskit.core.kron_als import Blocks, orthonormal
from compresskit.core.kron_refine import Refinement
from compresskit.core.kron_weighted import STAGES, Shape, WeightedSums
from compresskit.testing.cases import normal

ROUNDS = 4


def second_moment(n, samples=None, seed=5):
    inputs = normal(n, samples or 2 * n, seed=seed)
    return inputs @ inputs.T / inputs.shape[1]


@st.composite
def problems(draw):
    """Weight, grid, terms and importance with an R that is none, of p = 1, or a product."""
    p, q, r, s = (draw(st.integers(1, 4)) for _ in range(4))
    rows = p * r - draw(st.integers(0, 1 if min(p, r) > 1 else 0))
    grid = Grid(draw(st.booleans()), p, q)
    cols = draw(st.sampled_from([None, second_moment(q * s), second_moment(q * s, 2), normal(q * s).square()]))
    moment = None
    if draw(st.booleans()) and rows == p * r:
        outer, inner = second_moment(p, seed=7), second_moment(r, seed=8)
        moment = torch.kron(outer, inner) if grid.left else torch.kron(inner, outer)
    terms = draw(st.integers(1, min(p * q, r * s)))
    return normal(rows, q * s), grid, terms, Importance(cols, moment)


def blocks_of(weight, grid, importance):
    metric = importance.metric(weight)
    return Blocks(weight, metric.cols.after(weight), metric, grid)


def errors_of(blocks, weight, grid, importance, state):
    """Weighted error of a state and the gradient in blocks, from the dense matrices."""
    p, q, r, s = blocks.size
    metric = importance.metric(weight)
    rows = torch.eye(p * r, dtype=torch.float64)
    rows[: len(weight), : len(weight)] = metric.rows.dense(len(weight), like=weight)
    padded = torch.zeros(p * r, q * s, dtype=torch.float64)
    padded[: len(weight)] = weight
    difference = padded - uncut(state.small.T @ state.wide.flatten(1), grid, p * r, q * s)
    weighed = rows @ difference @ metric.cols.dense(q * s, like=weight)
    return float((weighed * difference).sum()), cut(weighed, grid)


@pytest.mark.parametrize(("grid", "terms"), [(Grid(True, 2, 2), 1), (Grid(False, 4, 4), 1), (Grid(True, 4, 4), 4)])
def test_extrapolated_rounds_never_raise_the_error_and_ten_do_what_twice_as_many_plain_ones_do(grid, terms):
    weight, importance = normal(32, 48), Importance(second_moment(48, 60))
    blocks = blocks_of(weight, grid, importance)
    start = plain = blocks.start(terms)
    for _ in range(20):
        plain = blocks.with_small(*orthonormal(blocks.with_wide(plain)))
    errors = [blocks.descend(start, rounds).error for rounds in range(11)]
    assert errors == sorted(errors, reverse=True)
    assert errors[10] <= plain.error * 1.002


def test_orthonormal_factors_are_turned_no_more_than_it_takes():
    state = blocks_of(normal(8, 12), Grid(True, 2, 2), Importance(second_moment(12))).start(3)
    small, wide = orthonormal(state)
    torch.testing.assert_close(small, state.small)
    torch.testing.assert_close(wide, state.wide)


@settings(max_examples=60)
@given(problems())
def test_each_half_step_solves_its_least_squares_problem_and_none_raises_the_error(problem):
    weight, grid, terms, importance = problem
    blocks = blocks_of(weight, grid, importance)
    size = 1 + float(weight.norm()) + blocks.energy
    state = blocks.start(terms)
    for _ in range(ROUNDS):
        error, gradient = errors_of(blocks, weight, grid, importance, state)
        torch.testing.assert_close(state.error, error, rtol=1e-5, atol=1e-6 * size)
        torch.testing.assert_close(
            state.small @ gradient, torch.zeros(()).expand(terms, gradient.shape[1]).double(), rtol=0, atol=1e-5 * size
        )
        half = blocks.with_wide(state)
        assert half.error <= state.error + 1e-9 * size
        error, gradient = errors_of(blocks, weight, grid, importance, half)
        torch.testing.assert_close(half.error, error, rtol=1e-5, atol=1e-6 * size)
        slope = float((half.wide.flatten(1) @ gradient.T).abs().max())
        assert slope <= 1e-5 * size * (1 + float(half.wide.norm()))
        state = blocks.with_small(*orthonormal(half))
        assert state.error <= half.error + 1e-9 * size
        torch.testing.assert_close(state.small @ state.small.T, torch.eye(terms).double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("rows", [12, 11])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_moment_of_rows_that_is_no_product_is_fitted_exactly_too(monkeypatch, left, rows, diagonal):
    monkeypatch.setattr(kron_refine, "CONJUGATE_STEPS", 300)
    weight, grid = normal(rows, 6), Grid(left, 3, 2)
    moment = normal(rows, seed=2).square() + 0.01 if diagonal else second_moment(rows)
    importance = Importance(second_moment(6), moment)
    blocks = blocks_of(weight, grid, importance)
    refinement = Refinement(blocks, weight, importance.metric(weight))
    state = refinement.best(blocks.start(2), refinement.plain(2))
    error, _ = errors_of(blocks, weight, grid, importance, state)
    torch.testing.assert_close(state.error, error)
    half = refinement._step_wide(state)
    _, gradient = errors_of(blocks, weight, grid, importance, half)
    torch.testing.assert_close(half.small @ gradient, torch.zeros(2, 12).double(), rtol=0, atol=1e-6)
    full = refinement._step_small(half)
    _, gradient = errors_of(blocks, weight, grid, importance, full)
    torch.testing.assert_close(full.wide.flatten(1) @ gradient.T, torch.zeros(2, 6).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_conjugate_gradients_cut_short_still_descend(monkeypatch, steps):
    monkeypatch.setattr(kron_refine, "CONJUGATE_STEPS", steps)
    weight, grid = normal(12, 6), Grid(True, 3, 2)
    importance = Importance(second_moment(6), second_moment(12))
    blocks = blocks_of(weight, grid, importance)
    refinement = Refinement(blocks, weight, importance.metric(weight))
    states = [refinement.best(blocks.start(2), refinement.plain(2))]
    for _ in range(ROUNDS):
        states.append(refinement.refine(states[-1], 1))
    assert all(new.error <= old.error for old, new in itertools.pairwise(states))
    assert states[-1].error < 0.95 * states[0].error


@pytest.mark.parametrize("rows", [None, second_moment(24), normal(24).square()])
def test_prices_are_never_below_the_fit_whatever_was_priced_beside_them(rows):
    weight, importance = normal(24, 12), Importance(second_moment(12), rows)
    shapes = [
        Shape(Grid(left, p, q), terms, terms * (p * q + 288 // (p * q)))
        for left in (True, False)
        for p, q in ((1, 2), (2, 2), (4, 3), (6, 1), (3, 4))
        for terms in (1, 2)
    ]
    sums, slack = WeightedSums(weight, importance, 25), 1e-5 * importance.squared_norm(weight)  # the ridge is 1e-6
    together = sums.prices(shapes)
    for shape, price in zip(shapes, together, strict=True):
        (alone,) = WeightedSums(weight, importance, 25).prices([shape])
        small, wide = sums.fit(shape)
        difference = weight - uncut(small.T @ wide, shape.grid, 24, 12)
        error = importance.squared_norm(difference)
        assert error <= min(price, alone) + slack
        assert alone <= price + slack
    assert len(STAGES) > 1
