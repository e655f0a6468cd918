"""BLAST: never worse than the SVD it starts from, better where there is something to gain, weighted or not."""

import itertools

import pytest
import torch

from compresskit.core.importance import Importance
from compresskit.decompositions.blast import Blast, BlastBlocks
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import OptionError, StructureError
from compresskit.testing.cases import normal, sample_weight


def moment(n, seed):
    """A second moment with a few strong directions."""
    x = normal(3 * n, n, seed=seed) * torch.arange(1, n + 1).pow(-1.0)
    return (x.T @ x / len(x)).float()


IMPORTANCES = {
    "plain": None,
    "inputs": Importance(cols=moment(36, 1)),
    "diagonals": Importance(cols=moment(36, 1).diagonal(), rows=moment(24, 2).diagonal()),
    "both": Importance(cols=moment(36, 1), rows=moment(24, 2)),
}


def error_of(fitted, importance):
    return fitted.relative_error if importance is None else fitted.weighted_error


@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
@pytest.mark.parametrize("blocks", [(4, 4), (2, 6), (8, 1)])
def test_more_rounds_are_never_worse_and_the_first_is_the_svd(importance, blocks):
    weight = sample_weight(24, 36)
    structure = BlastBlocks(24, 36, blocks, 6)
    low = SVD().fit(weight, structure=LowRank(24, 36, 6), importance=importance)
    fits = [Blast(rounds=rounds).fit(weight, structure=structure, importance=importance) for rounds in (0, 1, 5, 30)]
    errors = [error_of(fitted, importance) for fitted in fits]
    assert errors[0] == pytest.approx(error_of(low, importance), rel=1e-4)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    if min(blocks) > 1:
        assert errors[-1] < 0.92 * errors[0]


@pytest.mark.parametrize("importance", [None, "words", "both"])
def test_tall_weights_are_fitted_as_well_as_in_pieces(importance):
    """More rows in a block than columns in all: the fit works with what the rows span."""
    words = torch.arange(400).remainder(7).float()  # some never occur
    given = {
        None: None,
        "words": Importance(rows=words),
        "both": Importance(rows=words, cols=moment(12, 1)),
    }[importance]
    weight = sample_weight(400, 12)
    structure = BlastBlocks(400, 12, (4, 4), 5)
    low = SVD().fit(weight, structure=LowRank(400, 12, 5), importance=given)
    fitted = Blast().fit(weight, structure=structure, importance=given)
    assert error_of(fitted, given) < 0.98 * error_of(low, given)
    full = Importance(rows=words.diag() if given else torch.eye(400), cols=given.cols if given else None)
    without = Blast().fit(weight, structure=structure, importance=full)  # a full row moment: no short cut
    assert error_of(fitted, given) == pytest.approx(error_of(without, full), rel=0.05)


def test_block_diagonal_weights_are_out_of_reach_of_an_svd_but_not_of_blast():
    weight = torch.block_diag(*(normal(6, 6, seed=seed) for seed in range(4))).float()
    low = SVD().fit(weight, structure=LowRank(24, 24, 6)).relative_error
    assert Blast(rounds=200).fit(weight, structure=BlastBlocks(24, 24, (4, 4), 6)).relative_error < low / 3


@pytest.mark.parametrize("importance", [None, Importance(cols=moment(64, 1))], ids=["plain", "inputs"])
def test_prices_between_the_ranks_that_are_fitted_are_near(importance):
    """All ranks have a price, a few are fitted: what the others would really lose is as priced."""
    weight = sample_weight(96, 64)
    menu = list(Blast().menu(96, 64))
    analysis = Blast().analyse_for(weight, importance)
    prices = analysis.squared_errors(menu)
    assert prices == sorted(prices, reverse=True)
    for structure, price in list(zip(menu, prices, strict=True))[::3]:
        difference = weight - structure.dense(analysis.factors(structure))
        lost = float(difference.square().sum()) if importance is None else importance.squared_norm(difference)
        assert price**0.5 == pytest.approx(lost**0.5, rel=0.03, abs=1e-3)


@pytest.mark.parametrize("rows", [None, moment(192, 2).diagonal()], ids=["inputs", "diagonal rows"])
def test_prices_of_short_fits_fall_with_the_rank_are_kept_and_are_near(rows):
    importance = Importance(cols=moment(128, 1), rows=rows)
    weight = sample_weight(192, 128)
    menu = list(Blast().menu(192, 128))
    analysis = Blast().analyse_for(weight, importance)
    prices = analysis.squared_errors(menu)
    assert prices == sorted(prices, reverse=True)
    for structure, price in list(zip(menu, prices, strict=True))[::10]:
        lost = importance.squared_norm(weight - structure.dense(analysis.factors(structure)))
        assert lost <= price * (1 + 1e-4) + 1e-5 * importance.squared_norm(weight)
        assert price**0.5 == pytest.approx(lost**0.5, rel=0.08, abs=1e-3)


def test_prices_and_fits_do_not_depend_on_what_else_was_asked():
    importance, weight = Importance(cols=moment(128, 1)), sample_weight(192, 128)
    menu = list(Blast().menu(192, 128))
    one, other = (Blast().analyse_for(weight, importance) for _ in range(2))
    prices = one.squared_errors(menu)
    torch.testing.assert_close(other.factors(menu[30]), one.factors(menu[30]), rtol=0, atol=0)
    assert other.squared_errors(menu[25:35]) == prices[25:35]


def test_components_have_one_size_in_all_three_factors():
    fitted = Blast().fit(sample_weight(24, 24), structure=BlastBlocks(24, 24, (4, 2), 3))
    left, scales, right = (fitted.factors[name] for name in ("left", "scales", "right"))
    sizes = [left.square().mean((0, 1)), scales.square().mean((1, 2)), right.square().mean((0, 2))]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(sizes[0], sizes[2], rtol=1e-4, atol=0)


def test_the_menu_has_the_most_blocks_that_divide_and_is_smaller_than_the_weight():
    menu = list(Blast().menu(768, 3072))
    assert {structure.blocks for structure in menu} == {(8, 8)}
    assert all(structure.num_params < 768 * 3072 for structure in menu)
    assert list(Blast().menu(53, 59)) == []  # nothing divides primes


@pytest.mark.parametrize(
    ("options", "named"), [({"blocks": (0, 2)}, "blocks"), ({"rank": 0}, "rank"), ({"rounds": -1}, "rounds")]
)
def test_impossible_options_are_refused(options, named):
    with pytest.raises(OptionError, match=named):
        Blast(**options)


def test_impossible_sizes_are_refused():
    with pytest.raises(StructureError, match="cannot be cut in 5 x 2 blocks"):
        BlastBlocks(24, 24, (5, 2), 3)
    with pytest.raises(StructureError, match="the rank of a 24 x 24 weight is 1 to 24"):
        BlastBlocks(24, 24, (4, 2), 25)
