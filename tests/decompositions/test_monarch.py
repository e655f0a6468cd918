"""Monarch: the best of each block, priced exactly, weighted or not."""

import pytest
import torch

from compresskit.core.importance import Importance
from compresskit.decompositions.monarch import Monarch, MonarchBlocks
from compresskit.errors import OptionError, StructureError
from compresskit.testing.cases import normal, sample_weight
from tests.decompositions.test_blast import IMPORTANCES


def test_plain_blocks_are_truncated_svds():
    weight = sample_weight(24, 36, torch.float64)
    fitted = Monarch().fit(weight, structure=MonarchBlocks(24, 36, (2, 3), 4))
    tail = sum(
        float(torch.linalg.svdvals(block)[4:].square().sum())
        for band in weight.chunk(2, dim=0)
        for block in band.chunk(3, dim=1)
    )
    assert fitted.relative_error**2 * float(weight.square().sum()) == pytest.approx(tail)


@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
@pytest.mark.parametrize("blocks", [(2, 1), (1, 4), (2, 3)])
def test_prices_are_the_errors_of_the_fit(importance, blocks):
    weight = sample_weight(24, 36, torch.float64)
    menu = list(Monarch(blocks=blocks).menu(24, 36))
    prices = Monarch().analyse_for(weight, importance).squared_errors(menu)
    for structure, price in zip(menu, prices, strict=True):
        difference = weight - structure.dense(Monarch().fit(weight, structure=structure, importance=importance).factors)
        plain = float(difference.square().sum())
        measured = plain if importance is None else importance.squared_norm(difference)
        assert price == pytest.approx(measured, rel=1e-3, abs=1e-6 * float(weight.square().sum()))


def test_a_weighted_fit_beats_the_plain_one_by_its_own_measure():
    weight, structure = sample_weight(24, 36), MonarchBlocks(24, 36, (4, 1), 3)
    importance = Importance(cols=IMPORTANCES["inputs"].cols)
    plain = weight - structure.dense(Monarch().fit(weight, structure=structure).factors)
    ours = weight - structure.dense(Monarch().fit(weight, structure=structure, importance=importance).factors)
    assert importance.squared_norm(ours) < importance.squared_norm(plain)


def test_a_side_that_is_not_cut_is_one_plain_product():
    specs = MonarchBlocks(24, 36, (4, 1), 3).factor_specs()
    assert specs["right"].matrix
    assert specs["right"].shape == (12, 36)
    assert not specs["left"].matrix


def test_impossible_options_and_sizes_are_refused():
    with pytest.raises(OptionError, match="blocks are counts"):
        Monarch(blocks=(0, 1))
    with pytest.raises(OptionError, match="rank is a count"):
        Monarch(rank=0)
    with pytest.raises(StructureError, match="cannot be cut in 5 x 1 blocks"):
        MonarchBlocks(24, 24, (5, 1), 1)
    with pytest.raises(StructureError, match="the rank of a block of 6 x 24 is 1 to 6"):
        MonarchBlocks(24, 24, (4, 1), 7)


def test_block_diagonal_weights_are_recovered():
    weight = torch.block_diag(normal(6, 2, seed=1) @ normal(2, 6), normal(6, 2, seed=2) @ normal(2, 6))
    assert Monarch().fit(weight, structure=MonarchBlocks(12, 12, (2, 2), 2)).relative_error < 1e-7
