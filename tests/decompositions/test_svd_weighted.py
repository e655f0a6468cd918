"""Weighted SVD is the optimum: what the truncated SVD of R^1/2 W C^1/2 leaves, whatever the ranks of R and C."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.core.importance import Importance
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.testing.cases import normal, sample_weight


def moments(n, seed):
    """None, and by name: full, rank deficient, diagonal, with an entry that never matters."""
    wide, narrow, diagonal = normal(n, 2 * n, seed=seed), normal(n, max(n // 3, 1), seed=seed), normal(n, seed=seed)
    kinds = {"full": wide @ wide.T, "deficient": narrow @ narrow.T, "diagonal": diagonal.square()}
    kinds["gap"] = diagonal.square() * (torch.arange(n) > 0)
    return {"identity": None, **kinds}


KINDS = ("identity", "full", "deficient", "diagonal", "gap")


def root(moment, n):
    if moment is None or moment.dim() == 1:
        return torch.eye(n, dtype=torch.float64) if moment is None else moment.sqrt().diag()
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


@pytest.mark.parametrize("cols", KINDS)
@pytest.mark.parametrize("rows", KINDS)
@pytest.mark.parametrize("shape", [(14, 14), (20, 8), (8, 20)])
def test_every_rank_reaches_the_optimum(shape, rows, cols):
    weight = sample_weight(*shape, torch.float64)
    c, r = moments(shape[1], 3)[cols], moments(shape[0], 4)[rows]
    values = torch.linalg.svdvals(root(r, shape[0]) @ weight @ root(c, shape[1]))
    for rank in (1, 3, 7):
        fitted = SVD().fit(weight, structure=LowRank(*shape, rank), importance=Importance(c, r, ridge=1e-12))
        optimum = float(values[rank:].norm() / values.norm())
        torch.testing.assert_close(fitted.weighted_error, optimum, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 5), st.data())
def test_prices_are_the_weighted_errors_of_the_fit(rows, cols, samples, data):
    """Also where no or few samples were seen, and for weights of low rank."""
    weight = normal(rows, min(rows, 4)) @ normal(min(rows, 4), cols, seed=1)
    inputs = normal(cols, samples, seed=2)
    importance = Importance(inputs @ inputs.T)
    structure = LowRank(rows, cols, data.draw(st.integers(1, min(rows, cols))))
    (price,) = SVD().analyse_for(weight, importance).squared_errors([structure])
    fitted = SVD().fit(weight, structure=structure, importance=importance)
    energy = importance.squared_norm(weight)
    priced = math.sqrt(max(price, 0.0) / energy) if energy else 0.0
    torch.testing.assert_close(fitted.weighted_error, priced, rtol=1e-4, atol=2e-3)  # the ridge is 1e-6 of the energy


def test_without_weights_of_its_own_a_row_or_column_is_fitted_as_before():
    """A moment that is the identity written out, or zero everywhere, gives the plain fit."""
    weight = sample_weight(20, 8, torch.float64)
    structure = LowRank(20, 8, 3)
    plain = structure.dense(SVD().fit(weight, structure=structure).factors)
    for cols in (torch.eye(8), torch.full((8,), 3.0), torch.zeros(8, 8)):
        for rows in (None, torch.eye(20), torch.zeros(20)):
            fitted = SVD().fit(weight, structure=structure, importance=Importance(cols, rows))
            torch.testing.assert_close(structure.dense(fitted.factors), plain, rtol=1e-6, atol=1e-7)


def test_words_that_never_occur_are_still_fitted():
    """Rows of frequency zero cost nothing; the columns' space that the others chose serves them as well as it can."""
    weight, frequencies = sample_weight(53, 12, torch.float64), normal(53).abs() * (torch.arange(53) % 3 > 0)
    structure = LowRank(53, 12, 4)
    fitted = SVD().fit(weight, structure=structure, importance=Importance(rows=frequencies))
    space = torch.linalg.svd(fitted.factors["right"], full_matrices=False).Vh
    torch.testing.assert_close(structure.dense(fitted.factors), weight @ space.T @ space)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_fitted_like_the_same_numbers_in_float64(dtype):
    weight, inputs = sample_weight(20, 8).to(dtype), normal(8, 40)
    importance = Importance((inputs @ inputs.T).float())
    fitted = SVD().fit(weight, structure=LowRank(20, 8, 3), importance=importance)
    wide = SVD().fit(weight.double(), structure=LowRank(20, 8, 3), importance=importance)
    assert {tensor.dtype for tensor in fitted.factors.values()} == {dtype}
    torch.testing.assert_close(fitted.weighted_error, wide.weighted_error, rtol=1e-4, atol=1e-6)
