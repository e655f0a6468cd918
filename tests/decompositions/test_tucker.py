"""Tucker: what the conformance suite cannot know - the fold, the ranks, HOOI, and truncated SVD as a special case."""

import itertools
import math

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from compresskit.core.registry import decomposition
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.decompositions.tucker import Tucker, TuckerTensor
from compresskit.errors import BudgetError, OptionError, StructureError
from compresskit.testing.cases import normal, sample_weight

FULL = TuckerTensor(24, 30, (4, 6), (5, 6), (3, 4), (2, 5))
"""Order 4, every mode cut: the menu has no such structure, `fit` takes it all the same."""


def exactly(structure, *, seed=0):
    """A weight that this structure can hold without any error."""
    specs = structure.factor_specs().items()
    return structure.dense({name: normal(*spec.shape, seed=seed + i) for i, (name, spec) in enumerate(specs)})


def kronecker_dense(structure, factors):
    """The docstring's formula, word for word."""
    eye = [torch.eye(n, dtype=torch.float64) for n in structure.modes]
    row_first, row_last = factors.get("row_first", eye[0]), factors.get("row_last", eye[1])
    col_first, col_last = factors.get("col_first", eye[2]), factors.get("col_last", eye[3])
    return torch.kron(row_first, row_last) @ factors["core"] @ torch.kron(col_first, col_last)


@given(st.tuples(*[st.integers(1, 4)] * 4), st.data())
def test_any_modes_and_ranks_compute_the_formula(modes, data):
    ranks = [data.draw(st.integers(1, n)) for n in modes]
    n1, n2, m1, m2 = modes
    try:
        structure = TuckerTensor(n1 * n2, m1 * m2, (n1, n2), (m1, m2), tuple(ranks[:2]), tuple(ranks[2:]))
    except StructureError:
        size = math.prod(ranks)
        assert any(rank < n and rank > size // rank for n, rank in zip(modes, ranks, strict=True))
        return
    factors = {name: normal(*spec.shape, seed=i) for i, (name, spec) in enumerate(structure.factor_specs().items())}
    dense, x = kronecker_dense(structure, factors), normal(2, 3, structure.cols, seed=9)
    torch.testing.assert_close(structure.dense(factors), dense)
    torch.testing.assert_close(structure.matmul(x, factors), x @ dense.T)
    torch.testing.assert_close(structure.take_rows(torch.arange(structure.rows), factors), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "structure",
    [
        FULL,
        TuckerTensor(24, 30, (4, 6), (1, 30), (2, 5), (1, 7)),
        TuckerTensor(24, 30, (1, 24), (5, 6), (1, 7), (3, 4)),
        TuckerTensor(12, 200, (3, 4), (1, 200), (2, 3), (1, 5)),  # one mode longer than the others together
        TuckerTensor(200, 12, (1, 200), (3, 4), (1, 5), (2, 3)),
    ],
)
def test_a_weight_of_these_ranks_is_recovered(structure, dtype):
    weight = exactly(structure)
    fitted = Tucker().fit(weight.to(dtype), structure=structure)
    assert fitted.relative_error < (1e-5 if dtype == torch.float32 else 1e-7)
    torch.testing.assert_close(structure.dense(fitted.factors).double(), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (60, 8), (8, 60)])
@pytest.mark.parametrize("fold", ["rows", "cols"])
def test_full_folded_modes_are_the_truncated_svd(shape, fold):
    weight = sample_weight(*shape, torch.float64)
    rank = 5
    (whole,) = [
        s
        for s in Tucker(fold=fold).menu(*shape)
        if math.prod(s.ranks) == rank * (shape[0] if fold == "rows" else shape[1])
        and set(s.factor_specs()) == {"core", "col_last" if fold == "rows" else "row_last"}
    ]
    low_rank = LowRank(*shape, rank)
    assert (whole.num_params, whole.macs) == (low_rank.num_params, low_rank.macs)
    ours, svd = Tucker().fit(weight, structure=whole), SVD().fit(weight, structure=low_rank)
    torch.testing.assert_close(ours.relative_error, svd.relative_error, rtol=1e-8, atol=0)
    torch.testing.assert_close(whole.dense(ours.factors), low_rank.dense(svd.factors), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.5.attention.output.dense.weight",
        "encoder.layer.2.output.dense.weight",
    ],
)
@pytest.mark.parametrize("ratio", [4, 16])
def test_no_worse_than_svd_on_a_pretrained_weight(minilm, name, ratio):
    with safe_open(minilm / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor(name).float()
    ours, svd = Tucker().fit(weight, ratio=ratio), SVD().fit(weight, ratio=ratio)
    assert ours.structure.num_params <= weight.numel() / ratio
    assert ours.relative_error <= 1.002 * svd.relative_error


@pytest.mark.parametrize("structure", [FULL, *list(Tucker().menu(24, 30))[-60::13]])
def test_hooi_starts_from_the_price_and_each_sweep_gains(structure):
    weight = sample_weight(24, 30, torch.float64)
    (price,) = Tucker().analyse(weight).squared_errors([structure])
    relative_price = math.sqrt(price) / float(weight.norm())
    errors = [Tucker(sweeps=sweeps).fit(weight, structure=structure).relative_error for sweeps in (0, 1, 2, 5)]
    torch.testing.assert_close(errors[0], relative_price, rtol=1e-7, atol=1e-9)  # sweeps=0: truncated HOSVD
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[1] < errors[0] or len(structure.factor_specs()) == 2


def test_prices_are_summed_in_the_full_core():
    """Against the definition: project on the leading singular vectors of each unfolding, measure what is lost."""
    weight = sample_weight(24, 30, torch.float64)
    tensor = weight.reshape(FULL.modes)
    projected = tensor
    for axis, rank in enumerate(FULL.ranks):
        basis = torch.linalg.svd(tensor.movedim(axis, 0).flatten(1), full_matrices=False).U[:, :rank]
        projected = torch.tensordot(basis @ basis.T, projected, dims=([1], [axis])).movedim(0, axis)
    (price,) = Tucker().analyse(weight).squared_errors([FULL])
    torch.testing.assert_close(price, float((tensor - projected).square().sum()), rtol=1e-9, atol=0)


def test_structures_of_several_folds_are_priced_together():
    weight = sample_weight(24, 30)
    structures = [*Tucker().menu(24, 30), FULL, *Tucker(fold="cols").menu(24, 30)]
    analysis = Tucker().analyse(weight)
    alone = [Tucker().analyse(weight).squared_errors([structure])[0] for structure in structures[::9]]
    torch.testing.assert_close(analysis.squared_errors(structures)[::9], alone, rtol=1e-5, atol=1e-9)
    assert analysis.squared_errors([]) == []


def test_larger_ranks_are_not_priced_with_what_served_small_ones():
    left, right = (torch.linalg.qr(normal(n, 12, seed=n))[0] for n in (200, 12))
    weight = (left * 0.2 ** torch.arange(12) @ right.T).float()  # 4 % of the energy is beyond the first component
    small, large = (TuckerTensor(200, 12, (1, 200), (3, 4), (1, rank), (3, 4)) for rank in (1, 4))
    analysis = Tucker().analyse(weight)
    for structure in (small, large):
        assert analysis.squared_errors([structure]) == Tucker().analyse(weight).squared_errors([structure])


def test_tensorly_and_the_generators_are_left_as_they_were():
    before, numpy_state, torch_state = tl.get_backend(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = Tucker().fit(sample_weight(24, 30), structure=FULL)
    assert tl.get_backend() == before
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    torch.testing.assert_close(torch.get_rng_state(), torch_state, rtol=0, atol=0)
    with tl.backend_context("pytorch"):
        second = Tucker().fit(sample_weight(24, 30), structure=FULL)
    for name, tensor in first.factors.items():
        torch.testing.assert_close(second.factors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_is_shared_by_all_factors(scale):
    weight = sample_weight(24, 30)
    plain, scaled = (Tucker().fit(weight * c, structure=FULL) for c in (1.0, scale))
    torch.testing.assert_close(scaled.relative_error, plain.relative_error, rtol=1e-4, atol=0)
    share = scale ** (1 / len(plain.factors))
    for name, tensor in plain.factors.items():
        torch.testing.assert_close(scaled.factors[name].norm(), tensor.norm() * share, rtol=1e-3, atol=0)


def test_a_zero_weight_is_held_exactly():
    fitted = Tucker().fit(torch.zeros(24, 30), structure=FULL)
    assert fitted.relative_error == 0
    assert all(tensor.isfinite().all() for tensor in fitted.factors.values())


@pytest.mark.parametrize(
    ("options", "shape", "lookup", "modes"),
    [
        ({}, (768, 768), False, (24, 32, 1, 768)),
        ({"heads": 12}, (768, 3072), False, (12, 64, 1, 3072)),
        ({"heads": 7}, (768, 768), False, (24, 32, 1, 768)),  # 7 does not divide
        ({"fold": "cols", "heads": 12}, (768, 768), False, (1, 768, 12, 64)),
        ({}, (53, 24), False, (1, 53, 4, 6)),  # a prime number of rows
        ({"fold": "cols"}, (24, 53), False, (4, 6, 1, 53)),
        ({}, (53, 59), False, (1, 53, 1, 59)),
        ({}, (30522, 768), True, (1, 30522, 24, 32)),
        ({"fold": "rows"}, (24, 24), True, (1, 24, 4, 6)),
    ],
)
def test_which_side_is_folded_and_how(options, shape, lookup, modes):
    assert {structure.modes for structure in Tucker(**options).menu(*shape, lookup=lookup)} == {modes}


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (30522, 768), (53, 59)])
def test_the_menu_is_dense_enough_and_not_too_long(shape, lookup):
    rows, cols = shape
    menu = list(Tucker().menu(rows, cols, lookup=lookup))
    sizes = sorted(s.num_params for s in menu if 1 / 64 <= s.num_params / (rows * cols) <= 1)
    steps = [after / before for before, after in itertools.pairwise(sizes)]
    smallest_step = (rows + cols) / (rows * cols / 64)  # from one rank to the next
    assert max(steps) <= 1.02 + smallest_step
    assert len(menu) <= 400
    assert all(s.macs <= rows * cols for s in menu)
    if lookup:
        assert all(s.lookup_macs <= cols * (s.row_ranks[1] + sum(s.col_modes)) for s in menu)


def test_shapes_too_thin_to_gain_anything_have_an_empty_menu():
    assert [list(Tucker().menu(*shape)) for shape in [(1, 1), (1, 64), (64, 1), (2, 2)]] == [[], [], [], []]


def test_fixed_ranks_are_the_whole_menu():
    by_rows = TuckerTensor(24, 30, (4, 6), (1, 30), (2, 3), (1, 5))
    assert list(decomposition("tucker", {"ranks": "2x3x5"}).menu(24, 30)) == [by_rows]
    by_cols = TuckerTensor(24, 30, (1, 24), (5, 6), (1, 5), (2, 3))
    assert list(Tucker(ranks=(2, 3, 5), fold="cols").menu(24, 30)) == [by_cols]
    for impossible in [(5, 3, 5), (2, 3, 7), (4, 6, 31)]:
        assert list(Tucker(ranks=impossible).menu(24, 30)) == []
    with pytest.raises(BudgetError, match="has no structure for 24 x 30"):
        Tucker(ranks=(5, 3, 5)).fit(sample_weight(24, 30), ratio=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads is a number of attention heads, at least 1; got 0"),
        ({"ranks": (0, 1, 1)}, r"ranks of a Tucker tensor are at least 1; got \(0, 1, 1\)"),
        ({"sweeps": -1}, "sweeps is a number of HOOI iterations, at least 0; got -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Tucker(**options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((4, 6), (5, 5), (2, 3), (2, 3)), "do not make 24 x 30"),
        (((4, 6), (5, 6), (2, 7), (2, 3)), "each is 1 to the size of its mode"),
        (((4, 6), (5, 6), (0, 3), (2, 3)), "each is 1 to the size of its mode"),
        (((4, 6), (1, 30), (2, 3), (1, 7)), "at most the product of the others"),
        (((4, 6), (5, 6), (2, 3, 1), (2, 3)), "two modes and two ranks"),
    ],
)
def test_impossible_structures_are_refused(sizes, message):
    with pytest.raises(StructureError, match=message):
        TuckerTensor(24, 30, *sizes)
