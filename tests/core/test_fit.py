"""From a weight to a module: what is accepted, which structure is chosen, how the error is measured."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresskit.core.decomposition import CHUNK_ROWS, Fitted, as_matrix, is_conv1d, relative_error
from compresskit.core.importance import Importance
from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear
from compresskit.decompositions.kronecker import Kronecker, KroneckerSum
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import BudgetError, ImportanceError, OptionError, StructureError, WeightError
from compresskit.testing.cases import normal, sample_weight
from tests.core.toy import ToyDecomposition

WEIGHT = sample_weight(24, 16)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened(dtype, wide):
    matrix = as_matrix(WEIGHT.to(dtype))
    assert matrix.dtype == wide
    torch.testing.assert_close(matrix, WEIGHT.to(dtype).to(wide), rtol=0, atol=0)


def test_a_matrix_is_detached_and_not_copied():
    parameter = nn.Parameter(WEIGHT.clone())
    matrix = as_matrix(parameter)
    assert not matrix.requires_grad
    assert matrix.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"layer\.0 has shape \(3,\); a matrix \(rows, cols\) is needed"),
        (torch.zeros(2, 3, 4), r"layer\.0 has shape \(2, 3, 4\)"),
        (torch.zeros(0, 4), r"layer\.0 has shape \(0, 4\)"),
        (torch.zeros(2, 2, dtype=torch.int8), r"layer\.0 is of torch\.int8; only real floating-point weights"),
        (torch.zeros(2, 2, dtype=torch.complex64), r"layer\.0 is of torch\.complex64"),
        (torch.tensor([[1.0, math.nan], [math.inf, -math.inf]]), r"layer\.0 holds 1 NaN and 2 infinite values; mend"),
        (torch.tensor([[1.0, math.inf]], dtype=torch.float16), r"layer\.0 holds 0 NaN and 1 infinite values"),
    ],
)
def test_what_is_no_finite_real_matrix_is_refused_by_name(weight, message):
    with pytest.raises(WeightError, match=message):
        as_matrix(weight, "layer.0")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e19), (torch.float64, 1e154)])
def test_values_whose_squares_overflow_are_refused(dtype, value):
    large = torch.full((300, 300), value, dtype=dtype)
    with pytest.raises(WeightError, match=r"this weight holds values up to 1.0e\+\d+, too large to be squared"):
        as_matrix(large)
    torch.testing.assert_close(as_matrix(large / 1e4), large / 1e4, rtol=0, atol=0)


@given(st.floats(-30, 30), st.floats(0, 2))
def test_relative_error_does_not_depend_on_scale(exponent, share):
    weight = WEIGHT.double() * 10**exponent
    torch.testing.assert_close(relative_error(weight, weight * (1 - share)), share, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 1e38])
def test_relative_error_neither_overflows_nor_underflows(magnitude):
    weight = torch.full((4, 4), magnitude)
    torch.testing.assert_close(relative_error(weight, weight / 2), 0.5)


def test_relative_error_of_zero():
    zero = torch.zeros(3, 2)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, torch.ones(3, 2)) == math.inf
    assert relative_error(torch.ones(3, 2), zero) == 1


@pytest.mark.parametrize("arguments", [{}, {"ratio": 2, "structure": LowRank(24, 16, 2)}])
def test_fit_takes_one_of_ratio_and_structure(arguments):
    with pytest.raises(StructureError, match="fit takes either ratio= or structure="):
        SVD().fit(WEIGHT, **arguments)


@pytest.mark.parametrize("ratio", [0.99, 0, -3, math.nan, math.inf])
def test_a_ratio_below_one_or_without_value_is_refused(ratio):
    with pytest.raises(BudgetError, match=r"ratio is original / compressed parameters, at least 1; got"):
        SVD().fit(WEIGHT, ratio=ratio)


def test_a_structure_of_another_shape_or_kind_is_refused():
    with pytest.raises(StructureError, match=r"low-rank\(rank=2\) is for a weight of 16 x 24, this one is 24 x 16"):
        SVD().fit(WEIGHT, structure=LowRank(16, 24, 2))
    with pytest.raises(StructureError, match="svd does not fit structures of kind 'kronecker'"):
        SVD().fit(WEIGHT, structure=KroneckerSum(24, 16, (2, 2), (12, 8), 1))


@pytest.mark.parametrize("decomposition", [SVD(), Kronecker(), Kronecker(terms=2)])
@pytest.mark.parametrize("shape", [(24, 16), (53, 12), (7, 5), (31, 33)])
def test_an_unreachable_ratio_is_answered_with_one_that_is_reached(decomposition, shape):
    weight = sample_weight(*shape)
    with pytest.raises(BudgetError, match=r"has no structure for .* \(ratio 1000\); the highest ratio") as caught:
        decomposition.fit(weight, ratio=1000)
    highest = float(re.search(r"it reaches here is ([\d.]+)$", str(caught.value))[1])
    fitted = decomposition.fit(weight, ratio=highest)
    assert weight.numel() / fitted.structure.num_params >= highest


def test_options_that_leave_nothing_say_so():
    with pytest.raises(BudgetError, match=r"SVD\(rank=20.*has no structure for 24 x 16; other options may have"):
        SVD(rank=20).fit(WEIGHT, ratio=1)


@given(st.floats(1.1, 9.5))
def test_the_chosen_structure_has_the_least_error_of_those_that_use_the_budget(ratio):
    decomposition = Kronecker(small="both")
    budget = WEIGHT.numel() / ratio
    chosen = decomposition.fit(WEIGHT, ratio=ratio)
    near = [s for s in decomposition.menu(24, 16) if budget / 2 <= s.num_params <= budget]
    best = min((decomposition.fit(WEIGHT, structure=s).relative_error for s in near), default=chosen.relative_error)
    assert chosen.structure.num_params <= budget
    torch.testing.assert_close(chosen.relative_error, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [None, normal(24).abs(), normal(24, 30) @ normal(24, 30).T])
def test_the_weighted_error_is_measured(rows):
    cols = normal(16, 40) @ normal(16, 40).T
    importance = Importance(cols, rows)
    fitted = SVD().fit(WEIGHT.double(), ratio=3, importance=importance)
    difference = WEIGHT.double() - fitted.structure.dense(fitted.factors)
    expected = math.sqrt(importance.squared_norm(difference) / importance.squared_norm(WEIGHT.double()))
    torch.testing.assert_close(fitted.weighted_error, expected)
    assert fitted.weighted_error < fitted.relative_error
    assert fitted.to(torch.bfloat16).weighted_error == fitted.weighted_error


def test_the_weighted_error_of_a_tall_weight_is_measured_in_pieces():
    weight = normal(CHUNK_ROWS + 5, 4)
    importance = Importance(rows=normal(len(weight), seed=1).abs())
    fitted = SVD().fit(weight, structure=LowRank(*weight.shape, 2), importance=importance)
    difference = weight - fitted.structure.dense(fitted.factors)
    expected = math.sqrt(importance.squared_norm(difference) / importance.squared_norm(weight))
    torch.testing.assert_close(fitted.weighted_error, expected)


def test_without_importance_nothing_is_weighted():
    assert SVD().fit(WEIGHT, ratio=2).weighted_error is None
    plain, same = SVD().fit(WEIGHT, ratio=2), SVD().fit(WEIGHT, ratio=2, importance=Importance())
    torch.testing.assert_close(same.weighted_error, plain.relative_error)
    torch.testing.assert_close(dict(same.factors), dict(plain.factors), rtol=0, atol=0)


def test_a_weight_that_nothing_touches_has_no_weighted_error():
    assert SVD().fit(WEIGHT, ratio=2, importance=Importance(torch.zeros(16))).weighted_error == 0


def test_an_importance_of_another_layer_is_refused():
    with pytest.raises(ImportanceError, match="cols is of 24, this weight of 24 x 16 needs 16"):
        SVD().fit(WEIGHT, ratio=2, importance=Importance(torch.ones(24)))


def test_a_decomposition_without_data_aware_fit_says_so():
    assert not ToyDecomposition.is_data_aware()
    with pytest.raises(OptionError, match=r"toy has no data-aware fit; leave .* use one that has: .*svd"):
        ToyDecomposition().fit(WEIGHT, ratio=2, importance=Importance(torch.ones(16)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_change_of_the_bias_keeps_the_answer_to_the_mean_input(dtype):
    weight, mean = WEIGHT.to(dtype), normal(16, seed=3)
    fitted = SVD().fit(weight, ratio=4)
    wide = torch.promote_types(dtype, torch.float32)
    answer = fitted.structure.matmul(mean.to(wide), {k: v.to(wide) for k, v in fitted.factors.items()})
    torch.testing.assert_close(answer + fitted.bias_change(weight, mean), weight.to(wide) @ mean.to(wide))


@pytest.fixture
def fitted():
    return SVD().fit(WEIGHT, ratio=2)


def test_to_changes_the_dtype_of_the_factors_only(fitted):
    half = fitted.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.factors.values()} == {torch.bfloat16}
    assert (half.structure, half.relative_error) == (fitted.structure, fitted.relative_error)


def test_a_module_without_model_layer_is_a_linear_layer_without_bias(fitted):
    module = fitted.to_module()
    assert isinstance(module, FactorizedLinear)
    assert module.bias is None
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_modules_do_not_share_the_memory_of_the_fit(fitted):
    """A fit is a value: training a module made from it changes neither the fit nor another module."""
    like = nn.Linear(16, 24)
    modules = [fitted.to_module(), fitted.to_module(), fitted.to_module(like), fitted.to_module(like)]
    pointers = [tensor.data_ptr() for tensor in fitted.factors.values()]
    pointers += [tensor.data_ptr() for module in modules for tensor in module.factors().values()]
    assert len(set(pointers)) == len(pointers) == 2 * 5


def test_a_linear_layer_hands_over_bias_dtype_mode_and_whether_it_trains(fitted):
    like = nn.Linear(16, 24, dtype=torch.bfloat16).eval().requires_grad_(False)
    module = fitted.to_module(like)
    assert module.bias is like.bias
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_embedding_hands_over_its_padding_row():
    like = nn.Embedding(24, 16, padding_idx=-1)
    like.weight.data.copy_(WEIGHT)
    module = SVD().fit(like.weight, ratio=2).to_module(like)
    assert isinstance(module, FactorizedEmbedding)
    assert module.padding_idx == 23
    torch.testing.assert_close(module(torch.tensor(23)), WEIGHT[23], rtol=0, atol=0)


def test_a_conv1d_hands_over_its_layout():
    like = Conv1D(24, 16)
    module = SVD().fit(like.weight.T, ratio=2).to_module(like)
    assert is_conv1d(like)
    assert module.stored_transposed
    assert module.weight.shape == like.weight.shape == (16, 24)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (nn.Linear(24, 16), "weight of 24 x 16, that of the Linear to replace is 16 x 24"),
        (nn.Linear(16, 23), "that of the Linear to replace is 23 x 16"),
        (nn.Embedding(16, 24), "that of the Embedding to replace is 16 x 24"),
        (Conv1D(16, 24), "that of the Conv1D to replace is 16 x 24"),
        (nn.LayerNorm(24), "that of the LayerNorm to replace is 24"),
    ],
)
def test_a_layer_of_another_shape_is_refused(fitted, like, message):
    with pytest.raises(StructureError, match=message):
        fitted.to_module(like)


def test_a_fit_prints_without_its_numbers(fitted):
    assert repr(fitted).startswith(f"Fitted(structure=LowRank(rows=24, cols=16, rank={fitted.structure.rank}), rel")
    assert isinstance(fitted, Fitted)
