"""Importance: what it accepts, and that its arithmetic is that of the formulas, written out."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.core.importance import Importance
from compresskit.core.metric import CHUNK_ROWS, Moment
from compresskit.errors import ImportanceError
from compresskit.testing.cases import normal


def second_moment(n, samples=None, seed=5):
    inputs = normal(n, samples or 2 * n, seed=seed)
    return inputs @ inputs.T / inputs.shape[1]


def dense(moment, n):
    if moment is None:
        return torch.eye(n, dtype=torch.float64)
    return moment.diag() if moment.dim() == 1 else moment


def moments(n, seed):
    return st.sampled_from([None, second_moment(n, seed=seed), second_moment(n, 2, seed=seed), normal(n).abs()])


@given(moments(7, 1), moments(5, 2))
def test_the_squared_norm_is_the_trace(cols, rows):
    difference = normal(5, 7, seed=3)
    expected = float((dense(rows, 5) @ difference @ dense(cols, 7) @ difference.T).trace())
    torch.testing.assert_close(Importance(cols, rows).squared_norm(difference), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [None, normal(CHUNK_ROWS + 7).abs(), second_moment(CHUNK_ROWS + 7, 3)])
def test_a_tall_difference_is_weighed_in_pieces(rows):
    difference, cols = normal(CHUNK_ROWS + 7, 3, seed=4), second_moment(3)
    expected = float((dense(rows, CHUNK_ROWS + 7) @ difference @ cols @ difference.T).trace())
    torch.testing.assert_close(Importance(cols, rows).squared_norm(difference), expected, rtol=1e-9, atol=1e-9)


def test_the_squared_norm_is_the_mean_squared_error_of_the_answers():
    """What C stands for: ||D x||^2 on average over the samples it was made of."""
    inputs, difference = normal(6, 50), normal(4, 6, seed=1)
    expected = float((difference @ inputs).square().sum(0).mean())
    importance = Importance(inputs @ inputs.T / 50)
    torch.testing.assert_close(importance.squared_norm(difference), expected, rtol=1e-9, atol=1e-9)


def test_centred_takes_out_the_mean_that_a_bias_takes_up():
    inputs, difference = normal(6, 50) + 2, normal(4, 6, seed=1)
    answers = difference @ inputs
    spread = float((answers - answers.mean(1, keepdim=True)).square().sum(0).mean())
    full = Importance(inputs @ inputs.T / 50, mean=inputs.mean(1))
    torch.testing.assert_close(full.centred().squared_norm(difference), spread, rtol=1e-9, atol=1e-9)
    diagonal = Importance(inputs.square().mean(1), mean=inputs.mean(1))
    torch.testing.assert_close(diagonal.centred().cols, inputs.var(1, correction=0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("importance", "missing"), [(Importance(second_moment(3)), "mean"), (Importance(mean=normal(3)), "cols")]
)
def test_centring_needs_the_mean_and_the_second_moment(importance, missing):
    with pytest.raises(ImportanceError, match=f"{missing} is missing"):
        importance.centred()


def test_only_rows_that_are_not_coupled_can_be_cut():
    rows, difference = normal(8).abs(), normal(8, 3)
    parts = [Importance(rows=rows).of_rows(i, i + 4).squared_norm(difference[i : i + 4]) for i in (0, 4)]
    torch.testing.assert_close(sum(parts), Importance(rows=rows).squared_norm(difference))
    assert Importance(second_moment(3)).of_rows(0, 4).rows is None
    with pytest.raises(ImportanceError, match="couples them"):
        Importance(rows=second_moment(8)).of_rows(0, 4)


@given(st.integers(1, 8), st.integers(1, 12))
def test_roots_are_roots_also_of_what_is_rank_deficient(n, samples):
    moment = Moment(second_moment(n, samples))
    root, inverse = moment.root().values, moment.inverse_root().values
    torch.testing.assert_close(root @ root, moment.values, rtol=1e-7, atol=1e-9)
    pinv = torch.linalg.pinv(moment.values, rcond=1e-10, hermitian=True)
    torch.testing.assert_close(inverse @ inverse, pinv, rtol=1e-4, atol=1e-6 * float(pinv.abs().max()))
    diagonal = Moment(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(diagonal.root().values, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(diagonal.inverse_root().values, torch.tensor([0.5, 0.0]))


@given(moments(7, 1), moments(5, 2), st.floats(-6, 6))
def test_the_metric_is_normalised_and_scales_back(cols, rows, exponent):
    difference, unit = normal(5, 7, seed=3), 10.0**exponent
    importance = Importance(None if cols is None else cols * unit, rows, ridge=1e-9)
    metric = importance.metric(difference)
    torch.testing.assert_close(
        metric.squared_norm(difference), importance.squared_norm(difference), rtol=1e-6, atol=1e-9
    )
    for moment, n in ((metric.cols, 7), (metric.rows, 5)):
        torch.testing.assert_close(float(dense(moment.values, n).diagonal().mean()), 1.0, rtol=1e-6, atol=0)


def test_noise_is_expected_of_inputs_alone_and_of_all_directions_alike():
    cols, rows, difference = second_moment(6), second_moment(4), normal(4, 6)
    quiet, noisy = (Importance(cols, rows, noise=noise).metric(cols) for noise in (0.0, 0.5))
    expected = quiet.cols.values + 0.5 * torch.eye(6)  # of mean 1 on its diagonal
    torch.testing.assert_close(noisy.cols.values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(noisy.rows.values, quiet.rows.values, rtol=0, atol=0)
    assert Importance(cols, rows, noise=0.5).squared_norm(difference) == Importance(cols, rows).squared_norm(difference)


def test_a_moment_of_zero_says_nothing_and_costs_nothing():
    metric = Importance(torch.zeros(3, 3), torch.ones(2)).metric(torch.zeros(1))
    assert metric.cols.is_identity
    assert metric.scale == 0
    assert metric.squared_norm(torch.ones(2, 3)) == 0


def test_negative_eigenvalues_are_refused():
    moment = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ImportanceError, match=r"positive semi-definite; this one has eigenvalues from -1 to 3"):
        Moment(moment).root()
    with pytest.raises(ImportanceError, match=r"this one has eigenvalues from -1 to 3"):
        Importance(moment).metric(moment)


def test_eigenvalues_that_rounding_left_below_zero_are_lifted():
    """As they come from sums in float32 where a few inputs outweigh the others by far."""
    inputs = normal(40, 5) * torch.tensor([1e3] + [1.0] * 39).double()[:, None]
    moment = (inputs @ inputs.T).float() + 0.3 * second_moment(40, 3).float().tril(-1).sign()
    moment = (moment + moment.T) / 2
    assert torch.linalg.eigvalsh(moment.double())[0] < -2e-6 * moment.diagonal().mean()
    values = torch.linalg.eigvalsh(Importance(moment).metric(moment).cols.values)
    assert values[0] > 0.9e-6


def test_what_summing_in_float32_leaves_is_accepted():
    moment = second_moment(6).float()
    moment[1, 2] *= 1 + 1e-6
    metric = Importance(moment).metric(moment)
    torch.testing.assert_close(metric.cols.values, metric.cols.values.T, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cols": torch.zeros(2, 3)}, r"cols has shape \(2, 3\); a second moment is square"),
        ({"rows": torch.zeros(0)}, r"rows has shape \(0,\); a square matrix or its diagonal is needed"),
        ({"cols": torch.zeros(2, 2, 2)}, r"cols has shape \(2, 2, 2\)"),
        ({"mean": torch.zeros(2, 2)}, r"mean has shape \(2, 2\); a vector is needed"),
        ({"cols": torch.ones(2, dtype=torch.long)}, r"cols is of torch.int64; real floating-point"),
        ({"rows": torch.tensor([1.0, math.nan, math.inf])}, "rows holds 1 NaN and 1 infinite values"),
        ({"cols": torch.tensor([[1.0, 0.5], [0.1, 1.0]])}, "cols is not symmetric: values up to 1 differ by up to 0.4"),
        ({"rows": torch.tensor([1.0, -2.0])}, "rows weighs entry 1 with -2; weights are 0 or more"),
        ({"cols": -torch.eye(2)}, "cols weighs entry 0 with -1"),
        ({"ridge": -1.0}, "ridge is a share of the mean of the diagonal, at least 0; got -1"),
        ({"ridge": math.nan}, "at least 0; got nan"),
        ({"noise": -0.5}, "noise is a share of the mean of the diagonal, at least 0; got -0.5"),
    ],
)
def test_what_is_no_importance_is_refused(arguments, message):
    with pytest.raises(ImportanceError, match=message):
        Importance(**arguments)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (Importance(second_moment(3)), "cols is of 3, this weight of 4 x 5 needs 5"),
        (Importance(rows=torch.ones(5)), "rows is of 5, this weight of 4 x 5 needs 4"),
        (Importance(mean=torch.ones(4)), "mean is of 4, this weight of 4 x 5 needs 5"),
    ],
)
def test_the_importance_of_another_layer_is_refused(importance, message):
    with pytest.raises(ImportanceError, match=message):
        importance.squared_norm(torch.zeros(4, 5))


def test_a_nearly_constant_input_is_centred_to_a_second_moment_all_the_same():
    generator = torch.Generator().manual_seed(0)
    x = 30 + 1e-3 * torch.randn(64, 12, generator=generator)
    cols, mean = x.T @ x / len(x), x.mean(0)  # in float32, which leaves next to nothing of the differences
    centred = Importance(cols=cols, mean=mean).centred()
    assert torch.linalg.eigvalsh(centred.cols.double())[0] >= -1e-6 * centred.cols.diagonal().max()
    centred.metric(torch.zeros(3, 12)).cols.root()


def test_one_that_remembers_keeps_its_metric_until_it_is_told_to_forget():
    importance, like = Importance(torch.eye(4), torch.ones(3)), torch.ones(3, 4)
    assert importance.metric(like) is not importance.metric(like)
    remembering = importance.remembering()
    kept = remembering.metric(like)
    assert remembering.metric(like) is kept
    torch.testing.assert_close(kept.cols.values, importance.metric(like).cols.values, rtol=0, atol=0)
    noisy = dataclasses.replace(remembering, noise=1.0).metric(like)
    assert float(noisy.cols.values[0, 0]) == pytest.approx(2, rel=1e-3)
    remembering.forget()
    assert remembering.metric(like) is not kept


def test_products_with_a_weight_are_computed_once_for_it_and_are_right(monkeypatch):
    weight, other, cols = normal(6, 10).float(), normal(6, 10, seed=2).float(), normal(10, 30)
    metric = Importance(cols=cols @ cols.T).metric(weight)
    for matrix in (weight, other, weight):
        exact = matrix.double() @ metric.cols.values
        torch.testing.assert_close(metric.answers(matrix), exact)
        torch.testing.assert_close(metric.gram(matrix).values, exact @ matrix.double().T)
    assert metric.answers(weight) is metric.answers(weight)
    assert metric.gram(weight) is metric.gram(weight)
    assert metric.gram(weight).eigen is metric.gram(weight).eigen
    values, vectors = metric.gram(weight).eigen
    torch.testing.assert_close(vectors * values @ vectors.T, metric.gram(weight).values)


@pytest.mark.parametrize("samples", [20, 3])  # positive definite, and not
@pytest.mark.parametrize("ridge", [1e-6, 0.0])
def test_a_moment_is_checked_once_and_is_the_same_when_it_is_not_checked(samples, ridge):
    inputs = normal(10, samples)
    remembering = Importance(cols=inputs @ inputs.T, ridge=ridge).remembering()
    first = remembering.metric(torch.zeros(1)).cols.values
    remembering.forget()
    torch.testing.assert_close(remembering.metric(torch.zeros(1)).cols.values, first, rtol=0, atol=0)


@pytest.mark.parametrize("samples", [20, 3])
def test_what_is_whitened_has_the_weighted_products_of_its_rows(samples):
    inputs, matrix = normal(10, samples), normal(4, 10, seed=2)
    full = inputs @ inputs.T
    for moment in (Moment(None), Moment(full.diagonal()), Moment(full)):
        whitened = moment.whitened(matrix)
        torch.testing.assert_close(whitened @ whitened.T, moment.after(matrix) @ matrix.T)
