"""Kronecker: nearest in Frobenius norm by an independent calculation, exact with all terms, and the papers' shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compresskit.decompositions.kronecker import Kronecker, KroneckerSum
from compresskit.errors import BudgetError, OptionError, StructureError
from compresskit.testing.cases import Case, normal, sample_weight


def rearranged(weight, left, right):
    """Van Loan and Pitsianis: one row per entry of the left factor, one column per entry of the right one."""
    (p, q), (r, s) = left, right
    padded = F.pad(weight, (0, 0, 0, p * r - weight.shape[0]))
    return padded.reshape(p, r, q, s).permute(0, 2, 1, 3).reshape(p * q, r * s)


def nearest(weight, structure):
    """The best sum of Kronecker products, by the full SVD of the rearranged matrix and `torch.kron`."""
    u, values, v = torch.linalg.svd(rearranged(weight, structure.left, structure.right), full_matrices=False)
    terms = [
        torch.kron((u[:, k] * values[k]).view(structure.left), v[k].view(structure.right).contiguous())
        for k in range(structure.terms)
    ]
    return sum(terms)[: structure.rows]


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def structures(draw, padded=False):
    (p, q), (r, s) = draw(shapes), draw(shapes)
    rows = draw(st.integers(max(p * (r - 1), (p - 1) * r) + 1, p * r)) if padded else p * r
    return KroneckerSum(rows, q * s, (p, q), (r, s), draw(st.integers(1, min(p * q, r * s))))


@settings(max_examples=200)
@given(structures())
def test_the_fit_is_the_nearest_sum(structure):
    """Both orders of the factors, any number of terms: the same matrix as from the rearranged weight."""
    weight = normal(structure.rows, structure.cols)
    fitted = Kronecker().fit(weight, structure=structure)
    expected = nearest(weight, structure)
    torch.testing.assert_close(structure.dense(fitted.factors), expected, rtol=1e-6, atol=1e-6)
    error = float((weight - expected).norm() / weight.norm())
    torch.testing.assert_close(fitted.relative_error, error, rtol=1e-6, atol=1e-7)


@settings(max_examples=200)
@given(structures(padded=True))
def test_padded_rows_count_as_zero_in_the_fit_and_not_in_the_error(structure):
    weight = normal(structure.rows, structure.cols)
    fitted = Kronecker().fit(weight, structure=structure)
    expected = nearest(weight, structure)
    torch.testing.assert_close(structure.dense(fitted.factors), expected, rtol=1e-6, atol=1e-6)
    (price,) = Kronecker().analyse(weight).squared_errors([structure])
    energy = float(weight.square().sum())
    assert fitted.relative_error**2 * energy <= price + 1e-9 * energy


@settings(max_examples=200)
@given(structures(padded=True), st.sampled_from([(), (3,), (2, 0), (2, 3)]))
def test_arithmetic_of_every_kind_of_structure(structure, lead):
    case = Case(Kronecker(), structure, lookup=False)
    factors = case.factors()
    small, wide = structure.unpack(factors)
    left, right = (small, wide) if structure.small_left else (wide, small)
    dense = sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(left, right, strict=True))
    dense = dense[: structure.rows]
    torch.testing.assert_close(structure.dense(factors), dense, rtol=1e-9, atol=1e-9)
    x, bias = normal(*lead, structure.cols), normal(structure.rows)
    torch.testing.assert_close(structure.matmul(x, factors, bias), x @ dense.T + bias, rtol=1e-9, atol=1e-9)
    index = torch.arange(structure.rows)
    torch.testing.assert_close(structure.take_rows(index, factors), dense, rtol=1e-9, atol=1e-9)


@given(structures(padded=True))
def test_packing_and_unpacking_are_inverse(structure):
    (p, q), (r, s), k = structure.small, structure.wide, structure.terms
    small, wide = normal(k, p, q), normal(k, r, s, seed=1)
    factors = structure.pack(small, wide)
    assert {name: tuple(tensor.shape) for name, tensor in factors.items()} == {
        name: spec.shape for name, spec in structure.factor_specs().items()
    }
    for found, expected in zip(structure.unpack(factors), (small, wide), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("left", "right"), [((2, 3), (6, 4)), ((6, 4), (2, 3)), ((3, 2), (2, 3)), ((1, 4), (12, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_terms_make_any_weight(left, right, dtype):
    rows, cols = left[0] * right[0], left[1] * right[1]
    terms = min(math.prod(left), math.prod(right))
    fitted = Kronecker().fit(normal(rows, cols, dtype=dtype), structure=KroneckerSum(rows, cols, left, right, terms))
    torch.testing.assert_close(fitted.relative_error, 0.0, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("left", [(2, 2), (4, 3), (5, 1), (27, 6)])
def test_53_rows_are_padded(left):
    p, q = left
    structure = KroneckerSum(53, 12, left, (-(-53 // p), 12 // q), 1)
    weight = normal(53, 12)
    fitted = Kronecker().fit(weight, structure=structure)
    torch.testing.assert_close(structure.dense(fitted.factors), nearest(weight, structure), rtol=1e-6, atol=1e-6)
    module = fitted.to_module()
    x = normal(5, 12)
    torch.testing.assert_close(module(x), x @ structure.dense(fitted.factors).T, rtol=1e-9, atol=1e-9)
    with pytest.raises(IndexError):
        structure.take_rows(torch.tensor(53), fitted.factors)


@pytest.mark.parametrize("decomposition", [Kronecker(small="both"), Kronecker(terms=2), Kronecker(terms=3)])
@pytest.mark.parametrize("shape", [(48, 36), (509, 24), (24, 64)])
def test_prices_by_partial_trace_are_those_of_each_structure_alone(decomposition, shape):
    """Priced together, the Gram matrix of a coarse grid comes from a finer one; priced alone, from the blocks."""
    weight = sample_weight(*shape, torch.float64)
    menu = list(decomposition.menu(*shape))
    together = decomposition.analyse(weight).squared_errors(menu)
    alone = [decomposition.analyse(weight).squared_errors([structure])[0] for structure in menu]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    energy = float(weight.square().sum())
    direct = [energy - float(rearranged_values(weight, s)[: s.terms].square().sum()) for s in menu]
    torch.testing.assert_close(together, direct, rtol=1e-8, atol=1e-10 * energy)


def rearranged_values(weight, structure):
    return torch.linalg.svdvals(rearranged(weight, structure.left, structure.right))


def test_the_small_factor_stands_where_the_option_says():
    for small, sides in (("left", {True}), ("right", {False}), ("both", {True, False})):
        menu = list(Kronecker(small=small).menu(48, 36))
        assert {s.small_left for s in menu if math.prod(s.left) != math.prod(s.right)} == sides
        assert {math.prod(s.small) for s in menu} >= {2, 4, 6, 9, 12, 24}
    assert {s.wide_first for s in Kronecker(small="both").menu(48, 36)} == {True, False}


@given(structures(padded=True))
@settings(max_examples=40, deadline=None)
def test_the_highest_rank_is_that_of_random_factors(structure):
    torch.manual_seed(0)
    specs = structure.factor_specs()
    dense = structure.dense({name: torch.randn(spec.shape, dtype=torch.float64) for name, spec in specs.items()})
    assert int(torch.linalg.matrix_rank(dense)) == structure.max_rank


@pytest.mark.parametrize(("rows", "cols"), [(384, 384), (1536, 384), (384, 1536), (51, 48)])
def test_full_rank_offers_no_stacks_of_a_few_rows(rows, cols):
    every, full = (list(Kronecker(full_rank=choice).menu(rows, cols)) for choice in (False, True))
    assert {structure.max_rank for structure in full} == {min(rows, cols)}
    assert full == [structure for structure in every if structure.max_rank == min(rows, cols)]
    assert 0 < len(full) < len(every)


def test_full_rank_is_not_asked_of_lookups():
    assert list(Kronecker(full_rank=True).menu(1000, 48, lookup=True)) == list(Kronecker().menu(1000, 48, lookup=True))


def test_full_rank_holds_for_fixed_shapes():
    assert list(Kronecker(full_rank=True, left=(4, 4)).menu(48, 48))
    assert not list(Kronecker(full_rank=True, left=(8, 1)).menu(48, 48))
    assert list(Kronecker(full_rank=True, left=(8, 1), terms=8).menu(48, 48))


def test_terms_are_those_that_were_asked_for():
    assert {s.terms for s in Kronecker(terms=3).menu(48, 36)} == {3}


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({"left": (2, 3)}, (2, 3), (24, 12)),
        ({"right": (2, 3)}, (24, 12), (2, 3)),
        ({"left": (8, 6), "right": (6, 6)}, (8, 6), (6, 6)),
        ({"left": (5, 2)}, (5, 2), (10, 18)),
        ({"left": (5, 2), "right": (10, 18)}, (5, 2), (10, 18)),
    ],
)
def test_fixed_shapes_are_the_whole_menu(options, left, right):
    assert list(Kronecker(**options).menu(48, 36)) == [KroneckerSum(48, 36, left, right, 1)]


@pytest.mark.parametrize(
    "options", [{"left": (2, 5)}, {"right": (2, 5)}, {"left": (2, 2), "right": (2, 2)}, {"left": (1, 1), "terms": 2}]
)
def test_fixed_shapes_that_do_not_fit_leave_nothing(options):
    assert list(Kronecker(**options).menu(48, 36)) == []
    with pytest.raises(BudgetError, match="has no structure for 48 x 36; other options may have"):
        Kronecker(**options).fit(sample_weight(48, 36), ratio=1)


SITES = {"attention": (768, 768, 48), "ffn": (3072, 768, 12), "ffn_out": (768, 3072, 12), "words": (30522, 768, 1)}
"""Rows, cols and number of such weights in bert-base."""


K8 = {
    "attention": {"left": (384, 384)},
    "ffn": {"left": (8, 2)},
    "ffn_out": {"left": (2, 8)},
    "words": {"right": (1, 8)},
}
K21 = {
    "attention": {"left": (384, 48)},
    "ffn": {"left": (16, 2)},
    "ffn_out": {"left": (2, 16)},
    "words": {"right": (1, 16)},
}


@pytest.mark.parametrize(
    ("table", "attention", "ffn", "words"),
    [(K8, 7_078_080, 3_539_328, 2_930_120), (K21, 886_272, 1_770_240, 1_465_072)],
)
def test_the_shapes_of_kronecker_bert(table, attention, ffn, words):
    """Table 1 of Tahaei et al. 2022; the counts follow from the shapes it prints."""
    found = {}
    for part, options in table.items():
        rows, cols, number = SITES[part]
        (structure,) = Kronecker(**options).menu(rows, cols, lookup=part == "words")
        assert {side: getattr(structure, side) for side in options} == options
        found[part] = number * structure.num_params
    assert found["attention"] == attention
    assert found["ffn"] + found["ffn_out"] == ffn
    assert found["words"] == words


@pytest.mark.parametrize("vocabulary", [30522, 50257, 509])
def test_an_embedding_keeps_a_row_of_its_own_for_each_word(vocabulary):
    menu = list(Kronecker().menu(vocabulary, 96, lookup=True))
    assert {s.left[1] for s in menu} == {2, 3, 4, 6, 8, 12, 16, 24, 32, 48}
    assert {(s.left[0], s.right[0], s.lookup_macs) for s in menu} == {(1, vocabulary, 96)}


def test_the_menu_pads_where_the_rows_have_few_divisors():
    padded = {s.left[0]: s.left[0] * s.right[0] - 509 for s in Kronecker().menu(509, 24)}
    assert padded == {1: 0, 2: 1, 4: 3, 8: 3, 16: 3, 32: 3}
    assert {s.left[0] for s in Kronecker().menu(53, 12)} == {1}  # one row of 54 is more than 1 %
    assert all(s.left[0] * s.right[0] == 48 for s in Kronecker(small="both").menu(48, 36))


def test_each_term_is_split_evenly_and_the_terms_are_ordered():
    structure = KroneckerSum(24, 24, (4, 3), (6, 8), 4)
    weight = sample_weight(24, 24, torch.float64)
    small, wide = structure.unpack(Kronecker().fit(weight, structure=structure).factors)
    roots = rearranged_values(weight, structure)[:4].sqrt()
    torch.testing.assert_close(small.flatten(1).norm(dim=1), roots, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(wide.flatten(1).norm(dim=1), roots, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sides", [((1, 4), (30, 6)), ((30, 6), (1, 4))])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_one_token_is_looked_up_as_many_are(sides, terms):
    structure = KroneckerSum(30, 24, *sides, terms)
    factors = Kronecker().fit(sample_weight(30, 24, torch.float64), structure=structure).factors
    factors = {name: factor.requires_grad_() for name, factor in factors.items()}
    many = structure.take_rows(torch.arange(30), factors)
    for index in (torch.tensor(7), torch.tensor([7]), torch.tensor([[7]])):
        one = structure.take_rows(index, factors)
        assert one.shape == (*index.shape, 24)
        torch.testing.assert_close(one.flatten(), many[7], rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad(one.sum(), list(factors.values()), retain_graph=True)
        theirs = torch.autograd.grad(many[7].sum(), list(factors.values()), retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("left", "right", "terms", "message"),
    [
        ((2, 2), (4, 4), 1, r"\(2 x 2\) \(x\) \(4 x 4\) does not make 6 x 8"),
        ((2, 2), (5, 4), 1, r"\(2 x 2\) \(x\) \(5 x 4\) does not make 6 x 8"),
        ((7, 2), (1, 4), 1, r"\(7 x 2\) \(x\) \(1 x 4\) does not make 6 x 8"),
        ((4, 2), (2, 4), 1, r"\(4 x 2\) \(x\) \(2 x 4\) does not make 6 x 8"),
        ((2, 2), (3, 3), 1, r"\(2 x 2\) \(x\) \(3 x 3\) does not make 6 x 8"),
        ((2, 2), (3, 4), 5, "5 terms: 4 already make any weight of this shape"),
        ((2, 2), (3, 4), 0, "at least one term"),
        ((0, 2), (3, 4), 1, "Kronecker factors have two sizes each"),
        ((2, 2, 2), (3, 4), 1, "Kronecker factors have two sizes each"),
    ],
)
def test_impossible_structures_are_refused(left, right, terms, message):
    with pytest.raises(StructureError, match=message):
        KroneckerSum(6, 8, left, right, terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 0}, "terms is a number of Kronecker products, at least 1; got 0"),
        ({"rounds": -1}, "rounds is a number of rounds of a weighted fit, at least 0; got -1"),
        ({"left": (0, 2)}, r"a Kronecker factor are two integers from 1 on, as \(2, 2\); got \(0, 2\)"),
        ({"right": (2, -1)}, r"sizes of a Kronecker factor are two integers .* got \(2, -1\)"),
        ({"left": "2x2"}, "sizes of a Kronecker factor are two integers .* got '2x2'"),
        ({"left": (2, 2, 2)}, r"sizes of a Kronecker factor are two integers .* got \(2, 2, 2\)"),
        ({"left": 2}, "sizes of a Kronecker factor are two integers .* got 2"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Kronecker(**options)
