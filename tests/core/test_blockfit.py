"""The alternating descent behind BLAST: Gram matrices are those of the dense bases, and no round raises the error."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.core.blockfit import Blocks, _grams, _own_grams, refine
from compresskit.core.importance import Moment
from compresskit.testing.cases import normal


def moment(kind, n, seed):
    x = normal(2 * n, n, seed=seed)
    return Moment({"identity": None, "diagonal": x[0].square(), "full": x.T @ x}[kind])


def dense(moment, n):
    values = moment.values
    return torch.eye(n, dtype=torch.float64) if values is None else torch.diag(values) if values.dim() == 1 else values


@pytest.mark.parametrize("kind", ["identity", "diagonal", "full"])
def test_gram_matrices_are_those_of_the_bases(kind):
    bases, scales = normal(3, 4, 5, seed=1), normal(2, 3, 5, seed=2)
    metric = moment(kind, 12, 3)
    full = dense(metric, 12)
    for gram, row in zip(_grams(bases, metric, scales), scales, strict=True):
        tall = torch.cat([basis * scale for basis, scale in zip(bases, row, strict=True)])
        torch.testing.assert_close(gram, tall.T @ full @ tall)
    for j, gram in enumerate(_own_grams(bases, metric)):
        part = slice(4 * j, 4 * j + 4)
        torch.testing.assert_close(gram, bases[j].T @ full[part, part] @ bases[j])


KINDS = st.sampled_from(["identity", "diagonal", "full"])


@settings(max_examples=40, deadline=None)
@given(KINDS, KINDS, st.sampled_from([(3, 2), (1, 4), (4, 1), (4, 4)]), st.integers(1, 6), st.integers(0, 99))
def test_no_round_raises_the_error(rows, cols, blocks, rank, seed):
    (p, q), weight = blocks, normal(12, 8, seed=seed)
    left, right = moment(rows, 12, seed + 1), moment(cols, 8, seed + 2)
    factors = (
        normal(p, 12 // p, rank, seed=seed + 3),
        normal(p, q, rank, seed=seed + 4),
        normal(q, 8 // q, rank, seed=seed + 5),
    )
    errors = []
    for rounds in range(4):
        difference = weight - refine(weight, Blocks(*factors), left, right, rounds).dense()
        errors.append(float((difference * left.before(right.after(difference))).sum()))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_zero_weight_and_zero_factors_stay_finite():
    zeros = Blocks(torch.zeros(2, 4, 3), torch.zeros(2, 2, 3), torch.zeros(2, 4, 3))
    assert not refine(torch.zeros(8, 8), zeros, Moment(None), Moment(None), 2).dense().any()
