"""Weighted Tucker fits as structures: both folds, moments on either side, and what they refuse."""

import pytest
import torch

from compresskit.core.importance import Importance
from compresskit.decompositions.svd import SVD
from compresskit.decompositions.tucker import Tucker, TuckerTensor
from compresskit.errors import StructureError
from compresskit.testing.cases import normal, sample_weight, spread


def second_moment(n, samples=None, seed=5):
    inputs = normal(n, samples or 2 * n, seed=seed)
    return inputs @ inputs.T / inputs.shape[1]


SIDES = {
    "inputs": lambda m, n: Importance(second_moment(n, n // 3)),
    "rows": lambda m, n: Importance(rows=normal(m).square()),
    "both": lambda m, n: Importance(second_moment(n), second_moment(m)),
}


@pytest.mark.parametrize("fold", ["rows", "cols"])
@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (53, 12)])
@pytest.mark.parametrize("side", SIDES)
def test_weighted_fits_beat_plain_ones_at_every_size(fold, shape, side):
    weight, importance = sample_weight(*shape, torch.float64), SIDES[side](*shape)
    energy = importance.squared_norm(weight)
    for structure in spread(Tucker(fold=fold), *shape, lookup=False, count=9):
        plain = Tucker(fold=fold).fit(weight, structure=structure)
        fitted = Tucker(fold=fold).fit(weight, structure=structure, importance=importance)
        unaware = (importance.squared_norm(weight - structure.dense(plain.factors)) / energy) ** 0.5
        assert fitted.weighted_error <= 1.01 * unaware + 1e-5  # alternating fits end in optima of their own
        assert (torch.tensor(fitted.weighted_error) - torch.tensor(unaware)) < 0.01


def test_cutting_the_other_side_alone_is_the_weighted_svd():
    weight, importance = sample_weight(24, 36, torch.float64), Importance(second_moment(36, 9), normal(24).square())
    tucker = Tucker().fit(
        weight, structure=TuckerTensor(24, 36, (4, 6), (1, 36), (4, 6), (1, 5)), importance=importance
    )
    (low_rank,) = [s for s in SVD().menu(24, 36) if s.rank == 5]
    svd = SVD().fit(weight, structure=low_rank, importance=importance)
    torch.testing.assert_close(tucker.weighted_error, svd.weighted_error, rtol=1e-6, atol=1e-9)


def test_sweeps_lower_the_weighted_error():
    weight, importance = sample_weight(24, 36, torch.float64), Importance(second_moment(36), second_moment(24))
    structure = TuckerTensor(24, 36, (4, 6), (1, 36), (3, 3), (1, 7))
    errors = [
        Tucker(sweeps=sweeps).fit(weight, structure=structure, importance=importance).weighted_error
        for sweeps in (0, 1, 2, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_factors_are_levelled():
    """Core and factors share the scale, as in a plain fit."""
    weight, importance = 1e4 * sample_weight(24, 36), Importance(second_moment(36))
    structure = TuckerTensor(24, 36, (4, 6), (1, 36), (3, 3), (1, 7))
    norms = [float(f.norm()) for f in Tucker().fit(weight, structure=structure, importance=importance).factors.values()]
    assert max(norms) < 10 * min(norms)


def test_folding_both_sides_is_refused():
    structure = TuckerTensor(24, 36, (4, 6), (6, 6), (3, 3), (3, 3))
    with pytest.raises(StructureError, match="folds both sides; a weighted fit is possible where one is folded"):
        Tucker().fit(sample_weight(24, 36), structure=structure, importance=Importance(torch.ones(36)))
