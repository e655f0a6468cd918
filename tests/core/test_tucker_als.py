"""Weighted Tucker: each step solves its least-squares problem, prices are those of the start, errors never rise."""

import itertools

import pytest
import torch

from compresskit.core.importance import Importance
from compresskit.core.tucker_als import FoldedTucker
from compresskit.testing.cases import normal, sample_weight


def second_moment(n, samples=None, seed=5):
    inputs = normal(n, samples or 2 * n, seed=seed)
    return inputs @ inputs.T / inputs.shape[1]


MOMENTS = {
    "inputs": Importance(second_moment(10)),
    "deficient": Importance(second_moment(10, 3)),
    "rows": Importance(rows=second_moment(24)),
    "diagonals": Importance(normal(10).square(), normal(24).square() + 0.01),
    "both": Importance(second_moment(10, 4), second_moment(24, 30)),
}


@pytest.fixture(params=MOMENTS)
def importance(request):
    return MOMENTS[request.param]


@pytest.fixture(params=[(24, 10), (24, 40)])
def case(request, importance):
    """Weight, metric and problem; the other side is shorter or longer than the folded one."""
    rows, cols = request.param
    weight = sample_weight(rows, cols, torch.float64)
    metric = Importance(None if importance.cols is None else _wider(importance.cols, cols), importance.rows).metric(
        weight
    )
    return weight, metric, FoldedTucker(weight, metric, (4, 6))


def _wider(moment, n):
    if moment.dim() == 1:
        return moment.repeat(n // len(moment))
    return torch.block_diag(*[moment] * (n // len(moment)))


def error_of(weight, metric, approximation):
    return metric.squared_norm(weight - approximation) / metric.scale


def rebuilt(problem, state):
    return torch.kron(state.first.contiguous(), state.last.contiguous()) @ state.left @ problem.right(state)


@pytest.mark.parametrize("ranks", [(4, 6), (4, 3), (2, 6), (2, 3)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_errors_are_true_and_fall_from_the_price_on(case, ranks, rank):
    weight, metric, problem = case
    states = [problem.fit(ranks, rank, sweeps) for sweeps in range(4)]
    size = metric.squared_norm(weight) / metric.scale
    torch.testing.assert_close(states[0].error, problem.errors(ranks)[rank], rtol=1e-6, atol=1e-9 * size)
    for state in states:
        torch.testing.assert_close(
            state.error, error_of(weight, metric, rebuilt(problem, state)), rtol=1e-5, atol=1e-6 * size
        )
    assert all(new.error <= old.error + 1e-9 * size for old, new in itertools.pairwise(states))


@pytest.mark.parametrize("ranks", [(4, 3), (2, 6), (2, 3)])
def test_a_step_leaves_no_slope(case, ranks):
    """The gradient by the factor that was solved for is zero."""
    weight, metric, problem = case
    state = problem.fit(ranks, 3, 0)
    core = problem._core(state)
    size = metric.squared_norm(weight)
    for swapped in (False, True):
        basis, other = (state.last, state.first) if swapped else (state.first, state.last)
        if basis.shape[0] == basis.shape[1]:
            continue
        fixed = torch.einsum("ia,abk->bik" if swapped else "ib,abk->aik", other, core)
        found = problem._step(fixed, basis, swapped=swapped)
        tensor = torch.einsum("na,aik->ink" if swapped else "na,aik->nik", found, fixed).flatten(0, 1)
        gradient = metric.rows.before(problem._whitened - tensor).view(4, 6, -1)
        slope = torch.einsum("ink,aik->na" if swapped else "nik,aik->na", gradient, fixed)
        assert float(slope.abs().max()) < 1e-6 * (1 + size)


def test_whole_folded_modes_are_the_weighted_low_rank_optimum(case):
    weight, metric, problem = case
    whitened = metric.rows.root().before(metric.cols.root().after(weight))
    values = torch.linalg.svdvals(whitened).square()
    for rank in (1, 4, 9):
        torch.testing.assert_close(problem.errors((4, 6))[rank], float(values[rank:].sum()), rtol=1e-6, atol=1e-9)


def test_without_a_limit_on_the_rank_the_core_is_the_best_one(case):
    weight, metric, problem = case
    state = problem.fit((2, 3), 6, 2)
    approximation = torch.kron(state.first.contiguous(), state.last.contiguous()) @ problem.whole(state)
    size = metric.squared_norm(weight)
    torch.testing.assert_close(error_of(weight, metric, approximation), state.error, rtol=1e-5, atol=1e-6 * size)
