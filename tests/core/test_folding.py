"""Gram matrices and unfoldings against float64, and what a spectrum may be asked for."""

import pytest
import torch

from compresskit.core.folding import HALVED_SIZE, Unfolding, gram, row_gram
from compresskit.testing.cases import normal


def falling(rows, cols, base):
    """A float32 matrix with singular values base ** k."""
    short = min(rows, cols)
    left, right = (torch.linalg.qr(normal(n, short, seed=n))[0] for n in (rows, cols))
    return (left * torch.tensor(base, dtype=torch.float64) ** torch.arange(short) @ right.T).float()


@pytest.mark.parametrize("rows", [1, HALVED_SIZE - 1, HALVED_SIZE, HALVED_SIZE + 3, 3 * HALVED_SIZE + 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_of_a_gram_matrix_makes_all_of_it(rows, transposed):
    matrix = normal(50, rows).T if transposed else normal(rows, 50)
    torch.testing.assert_close(row_gram(matrix), matrix @ matrix.T)


@pytest.mark.parametrize("cols", [7, HALVED_SIZE + 5])
def test_a_gram_matrix_in_float64_is_one_of_chunks(cols):
    matrix = normal(90, cols).float()
    exact = matrix.double().T @ matrix.double()
    torch.testing.assert_close(gram(matrix, chunk=40), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_single_precision_serves_a_heavy_tail_only(shape):
    flat = Unfolding(normal(*shape).float(), 20)
    assert flat.sound == 20
    matrix = falling(*shape, 0.7)
    steep = Unfolding(matrix, 20)  # 1e-6 of the energy is beyond: float32 would blur what is asked for
    assert steep.sound == 60
    exact = torch.linalg.svdvals(matrix.double()).square()
    torch.testing.assert_close(steep.energies[:20], exact[:20], rtol=1e-5, atol=0)
    assert Unfolding(matrix).sound == 60


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("leading", [None, 20])
def test_bases_and_coordinates_make_the_matrix(shape, leading):
    matrix = normal(*shape).float()
    unfolding = Unfolding(matrix, leading)
    basis, coordinates = unfolding.basis(matrix, 60), unfolding.coordinates(matrix, 60)
    torch.testing.assert_close(basis @ coordinates, matrix, rtol=1e-4, atol=1e-4)
    norms = torch.linalg.vector_norm(coordinates, dim=1).double().square()
    torch.testing.assert_close(norms[:20], unfolding.energies[:20], rtol=1e-4, atol=0)


def test_what_was_forgotten_is_computed_again():
    matrix = normal(40, 50).float()
    unfolding = Unfolding(matrix)
    before = unfolding.coordinates(matrix, 30)
    unfolding.keep(10)
    assert unfolding.sound == 10
    torch.testing.assert_close(unfolding.coordinates(matrix, 30), before)
