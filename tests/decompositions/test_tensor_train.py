"""Tensor train: the chain of cores, the bound of TT-SVD, and truncated SVD as a special case."""

import itertools
import math

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tensorly.decomposition import tensor_train

from compresskit.core.registry import decomposition
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.decompositions.tensor_train import TensorTrain, TrainCores
from compresskit.errors import BudgetError, OptionError, StructureError
from compresskit.testing.cases import normal, sample_weight

SHAPES = [(24, 30), (30, 24), (12, 120), (120, 12)]


def cut(rows, cols, ranks):
    """Both sides folded to (small, large), as the menu does."""
    (structure,) = TensorTrain(ranks=ranks).menu(rows, cols)
    return structure


def seeded(structure):
    return {name: normal(*spec.shape, seed=i) for i, (name, spec) in enumerate(structure.factor_specs().items())}


def chain(structure, factors):
    """The tensor train by its definition, core after core: (rows, cols)."""
    (r1, r2), (c1, c2), (s1, s2, s3) = structure.row_modes, structure.col_modes, structure.ranks
    first = factors.get("first", torch.eye(r1, dtype=torch.float64))
    last = factors.get("last", torch.eye(c2, dtype=torch.float64))
    left, right = factors["left"].reshape(s1, r2, s2), factors["right"].reshape(s2, c1, s3)
    return torch.einsum("ia,ajb,bkc,cl->ijkl", first, left, right, last).reshape(structure.rows, structure.cols)


@given(st.tuples(*[st.integers(1, 4)] * 4), st.data())
def test_any_modes_and_ranks_compute_the_chain(modes, data):
    r1, r2, c1, c2 = modes
    s1, s3 = data.draw(st.integers(1, r1)), data.draw(st.integers(1, c2))
    s2 = data.draw(st.integers(1, min(s1 * r2, c1 * s3)))
    try:
        structure = TrainCores(r1 * r2, c1 * c2, (r1, r2), (c1, c2), (s1, s2, s3))
    except StructureError:
        assert r2 * s2 < s1 < r1 or c1 * s2 < s3 < c2
        return
    factors = seeded(structure)
    dense, x = chain(structure, factors), normal(2, 3, structure.cols, seed=9)
    torch.testing.assert_close(structure.dense(factors), dense)
    torch.testing.assert_close(structure.matmul(x, factors), x @ dense.T)
    torch.testing.assert_close(structure.take_rows(torch.arange(structure.rows), factors), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(2, 3, 2), (3, 3, 3), (2, 5, 3)])
def test_a_weight_of_these_ranks_is_recovered(shape, ranks, dtype):
    structure = cut(*shape, ranks)
    weight = structure.dense(seeded(structure))
    fitted = TensorTrain().fit(weight.to(dtype), structure=structure)
    assert fitted.relative_error < (1e-5 if dtype == torch.float32 else 1e-7)
    torch.testing.assert_close(structure.dense(fitted.factors).double(), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_price_is_the_bound_of_the_three_cuts(shape):
    rows, cols = shape
    weight = sample_weight(rows, cols, torch.float64)
    structure = cut(rows, cols, (2, 5, 3))
    (r1, _), (c1, c2) = structure.row_modes, structure.col_modes
    unfoldings = [weight.reshape(r1, -1), weight, weight.reshape(rows * c1, c2)]
    dropped = [
        float(torch.linalg.svdvals(unfolding)[rank:].square().sum())
        for unfolding, rank in zip(unfoldings, structure.ranks, strict=True)
    ]
    (price,) = TensorTrain().analyse(weight).squared_errors([structure])
    torch.testing.assert_close(price, sum(dropped), rtol=1e-9, atol=0)
    error = TensorTrain().fit(weight, structure=structure).relative_error * float(weight.norm())
    assert max(dropped) * (1 - 1e-9) <= error**2 <= price * (1 + 1e-9)  # no cut loses less than it does alone


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(2, 5, 3), (3, 4, 2), (2, 6, 2)])
def test_the_fit_keeps_up_with_tt_svd_of_the_whole_weight(shape, ranks):
    """We run TT-SVD on the leading coordinates of the weight only, and lose next to nothing by that."""
    weight = sample_weight(*shape, torch.float64)
    structure = cut(*shape, ranks)
    with tl.backend_context("pytorch"):
        cores = tensor_train(weight.reshape(*structure.row_modes, *structure.col_modes), [1, *ranks, 1])
        whole = cores.to_tensor().reshape(shape)
    error = TensorTrain().fit(weight, structure=structure).relative_error
    assert error <= 1.01 * float((weight - whole).norm() / weight.norm())


@pytest.mark.parametrize("shape", [*SHAPES, (53, 24), (24, 53), (53, 59)])
def test_full_outer_ranks_are_the_truncated_svd(shape):
    weight = sample_weight(*shape, torch.float64)
    (whole,) = [s for s in TensorTrain().menu(*shape) if set(s.factor_specs()) == {"left", "right"} and s.ranks[1] == 4]
    low_rank = LowRank(*shape, 4)
    assert (whole.num_params, whole.macs) == (low_rank.num_params, low_rank.macs)
    ours, svd = TensorTrain().fit(weight, structure=whole), SVD().fit(weight, structure=low_rank)
    torch.testing.assert_close(ours.relative_error, svd.relative_error, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.factors["left"].norm(dim=0), svd.factors["left"].norm(dim=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ratio", [4, 16])
def test_no_worse_than_svd_on_a_pretrained_weight(minilm, ratio):
    with safe_open(minilm / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("encoder.layer.2.output.dense.weight").float()
    ours, svd = TensorTrain().fit(weight, ratio=ratio), SVD().fit(weight, ratio=ratio)
    assert ours.structure.num_params <= weight.numel() / ratio
    assert ours.relative_error <= 1.002 * svd.relative_error


def test_tensorly_and_the_generators_are_left_as_they_were():
    before, numpy_state, torch_state = tl.get_backend(), np.random.get_state()[1].copy(), torch.get_rng_state()
    structure = cut(24, 30, (2, 5, 3))
    first = TensorTrain().fit(sample_weight(24, 30), structure=structure)
    assert tl.get_backend() == before
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    torch.testing.assert_close(torch.get_rng_state(), torch_state, rtol=0, atol=0)
    with tl.backend_context("pytorch"):
        second = TensorTrain().fit(sample_weight(24, 30), structure=structure)
    for name, tensor in first.factors.items():
        torch.testing.assert_close(second.factors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_large_and_small_numbers_keep_their_accuracy(scale):
    weight, structure = sample_weight(24, 30), cut(24, 30, (2, 5, 3))
    plain, scaled = (TensorTrain().fit(weight * c, structure=structure) for c in (1.0, scale))
    torch.testing.assert_close(scaled.relative_error, plain.relative_error, rtol=1e-4, atol=0)
    for name in ("left", "right"):
        ratio = float(scaled.factors[name].norm() / plain.factors[name].norm())
        torch.testing.assert_close(ratio, math.sqrt(scale), rtol=1e-3, atol=0)


def test_a_zero_weight_is_held_exactly():
    fitted = TensorTrain().fit(torch.zeros(24, 30), structure=cut(24, 30, (2, 5, 3)))
    assert fitted.relative_error == 0
    assert all(tensor.isfinite().all() for tensor in fitted.factors.values())


@pytest.mark.parametrize(
    ("shape", "lookup", "modes"),
    [
        ((768, 768), False, ((24, 32), (24, 32))),
        ((30522, 768), True, ((1, 30522), (24, 32))),
        ((53, 24), False, ((1, 53), (4, 6))),
        ((24, 53), False, ((4, 6), (53, 1))),
    ],
)
def test_how_the_sides_are_folded(shape, lookup, modes):
    menu = TensorTrain().menu(*shape, lookup=lookup)
    assert {(structure.row_modes, structure.col_modes) for structure in menu} == {modes}


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (30522, 768), (53, 59)])
def test_the_menu_is_dense_enough_and_not_too_long(shape, lookup):
    rows, cols = shape
    menu = list(TensorTrain().menu(rows, cols, lookup=lookup))
    sizes = sorted(s.num_params for s in menu if 1 / 64 <= s.num_params / (rows * cols) <= 1)
    steps = [after / before for before, after in itertools.pairwise(sizes)]
    smallest_step = (rows + cols) / (rows * cols / 64)  # from one rank to the next
    assert max(steps) <= 1.02 + smallest_step
    assert len(menu) <= 400
    assert all(s.macs <= rows * cols for s in menu)
    if lookup:
        assert all(s.lookup_macs <= cols * (s.ranks[1] + sum(s.col_modes)) for s in menu)


def test_shapes_too_thin_to_gain_anything_have_an_empty_menu():
    assert [list(TensorTrain().menu(*shape)) for shape in [(1, 1), (1, 64), (64, 1), (2, 2)]] == [[], [], [], []]


def test_fixed_ranks_are_the_whole_menu():
    structure = TrainCores(24, 30, (4, 6), (5, 6), (2, 7, 3))
    assert list(decomposition("tensor-train", {"ranks": "2x7x3"}).menu(24, 30)) == [structure]
    for impossible in [(5, 7, 3), (2, 13, 3), (2, 7, 7)]:
        assert list(TensorTrain(ranks=impossible).menu(24, 30)) == []
    with pytest.raises(BudgetError, match="has no structure for 24 x 30"):
        TensorTrain(ranks=(5, 7, 3)).fit(sample_weight(24, 30), ratio=1)


def test_impossible_options_are_refused():
    with pytest.raises(OptionError, match=r"ranks of a tensor train are at least 1; got \(1, 0, 1\)"):
        TensorTrain(ranks=(1, 0, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((4, 6), (5, 5), (2, 3, 2)), "do not make 24 x 30"),
        (((4, 6), (5, 6), (2, 13, 3)), "each is 1 to the product"),
        (((4, 6), (5, 6), (5, 3, 3)), "each is 1 to the product"),
        (((4, 6), (5, 6), (2, 3)), "two modes on each side and three ranks"),
    ],
)
def test_impossible_structures_are_refused(sizes, message):
    with pytest.raises(StructureError, match=message):
        TrainCores(24, 30, *sizes)
