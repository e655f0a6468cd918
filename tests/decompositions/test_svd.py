"""SVD is the nearest matrix of its rank: exactly where cheap, within one percent where it is randomised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from compresskit.decompositions import svd
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import BudgetError, OptionError, StructureError
from compresskit.testing.cases import normal, sample_weight


def optimal_errors(weight):
    """Relative error of the nearest matrix of rank 1, 2, ..., by the full decomposition in float64."""
    energies = torch.linalg.svdvals(weight.double()).square()
    tails = energies.flip(0).cumsum(0).flip(0)
    return (torch.cat([tails[1:], torch.zeros(1, dtype=torch.float64)]) / tails[0]).clamp_min(0).sqrt().tolist()


def errors(decomposition, weight, ranks):
    return [decomposition.fit(weight, structure=LowRank(*weight.shape, rank)).relative_error for rank in ranks]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (53, 7), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_reaches_the_optimum(shape, dtype):
    weight = sample_weight(*shape, dtype)
    ranks = range(1, min(shape) + 1)
    torch.testing.assert_close(errors(SVD(), weight, ranks), optimal_errors(weight), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.data())
def test_any_shape_and_any_true_rank(rows, cols, true_rank, data):
    """Weights of lower rank than asked for, the zero matrix among them, have finite factors and no error."""
    weight = normal(rows, true_rank) @ normal(true_rank, cols, seed=1)
    rank = data.draw(st.integers(1, min(rows, cols)))
    fitted = SVD().fit(weight, structure=LowRank(rows, cols, rank))
    expected = optimal_errors(weight)[rank - 1] if weight.any() else 0.0
    torch.testing.assert_close(fitted.relative_error, expected, rtol=1e-6, atol=1e-7)
    assert all(tensor.isfinite().all() for tensor in fitted.factors.values())


@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_prices_are_the_errors_of_the_fit(solver):
    weight = sample_weight(36, 20, torch.float64)
    structures = [LowRank(36, 20, rank) for rank in range(1, 21)]
    decomposition = SVD(solver=solver)
    priced = decomposition.analyse(weight).squared_errors(structures)
    measured = [(e * float(weight.norm())) ** 2 for e in errors(decomposition, weight, range(1, 21))]
    torch.testing.assert_close(priced, measured, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (600, 128)])
def test_the_randomised_solver_is_within_one_percent(shape):
    weight = sample_weight(*shape)
    ranks = (1, 4, 16, 48, 96)
    optimum = optimal_errors(weight)
    for rank, found in zip(ranks, errors(SVD(solver="randomized"), weight, ranks), strict=True):
        assert optimum[rank - 1] - 1e-6 <= found <= 1.01 * optimum[rank - 1], rank


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.5.attention.output.dense.weight",
        "encoder.layer.2.intermediate.dense.weight",
        "encoder.layer.2.output.dense.weight",
    ],
)
def test_both_solvers_on_a_pretrained_weight(minilm, name):
    with safe_open(minilm / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor(name).float()
    ranks = (8, 48, 150)
    optimum = [optimal_errors(weight)[rank - 1] for rank in ranks]
    torch.testing.assert_close(errors(SVD(solver="exact"), weight, ranks), optimum, rtol=1e-5, atol=1e-5)
    randomised = errors(SVD(solver="randomized"), weight, ranks)
    torch.testing.assert_close(randomised, optimum, rtol=0.01, atol=0)


def test_the_randomised_solver_has_a_generator_of_its_own():
    weight = sample_weight(60, 40)
    before = torch.get_rng_state()
    first = SVD(solver="randomized").fit(weight, ratio=4)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(1234)
    second = SVD(solver="randomized").fit(weight, ratio=4)
    for name, tensor in first.factors.items():
        torch.testing.assert_close(second.factors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "rank", "solver"), [(40, 2, "exact"), (40, 20, "exact"), (39, 5, "randomized"), (39, 6, "exact")]
)
def test_auto_is_exact_for_small_weights_and_for_large_ranks(monkeypatch, side, rank, solver):
    monkeypatch.setattr(svd, "EXACT_SIDE", side)
    weight = sample_weight(60, 40)
    structure = LowRank(60, 40, rank)
    auto, named = (svd_.fit(weight, structure=structure) for svd_ in (SVD(), SVD(solver=solver)))
    for name, tensor in named.factors.items():
        torch.testing.assert_close(auto.factors[name], tensor, rtol=0, atol=0)


def test_one_analysis_of_a_large_weight_serves_every_rank(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SIDE", 10)
    weight = sample_weight(60, 40)
    analysis = SVD().analyse(weight)
    for rank in (3, 24, 4):
        structure = LowRank(60, 40, rank)
        (expected,) = analysis.squared_errors([structure])
        reached = (weight - structure.dense(analysis.factors(structure))).square().sum()
        torch.testing.assert_close(float(reached), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("solver", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_both_factors_have_one_scale(shape, solver):
    """The k-th column of left and the k-th row of right have the same norm, the root of the k-th singular value."""
    weight = sample_weight(*shape, torch.float64)
    factors = SVD(solver=solver).fit(weight, structure=LowRank(*shape, 6)).factors
    roots = torch.linalg.svdvals(weight)[:6].sqrt()
    torch.testing.assert_close(factors["left"].norm(dim=0), roots, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors["right"].norm(dim=1), roots, rtol=1e-4, atol=1e-6)


def test_large_and_small_numbers_keep_their_accuracy():
    weight = sample_weight(40, 24)
    for scale in (1e-15, 1e15):
        found = errors(SVD(), weight * scale, [3, 10])
        torch.testing.assert_close(found, errors(SVD(), weight, [3, 10]), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_menu_holds_each_rank_that_is_smaller_than_the_weight(rows, cols):
    menu = list(SVD().menu(rows, cols))
    assert [s.rank for s in menu] == [r for r in range(1, min(rows, cols) + 1) if r * (rows + cols) <= rows * cols]
    assert list(SVD().menu(rows, cols, lookup=True)) == menu


def test_a_fixed_rank_is_the_whole_menu():
    assert list(SVD(rank=5).menu(24, 16)) == [LowRank(24, 16, 5)]
    assert list(SVD(rank=17).menu(24, 16)) == []
    with pytest.raises(BudgetError, match="has no structure for 24 x 16"):
        SVD(rank=17).fit(sample_weight(24, 16), ratio=1)


def test_impossible_ranks_are_refused():
    with pytest.raises(OptionError, match="rank is a count, at least 1; got 0"):
        SVD(rank=0)
    for rank in (0, 7):
        with pytest.raises(StructureError, match="the rank of a 8 x 6 weight is 1 to 6"):
            LowRank(8, 6, rank)
