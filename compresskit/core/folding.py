"""What decompositions share that fold a weight to a tensor: mode sizes, ranks worth pricing, bases of unfoldings."""

import math
from collections.abc import Callable, Iterator
from typing import final

import torch
from torch import Tensor

FINE_STEP, COARSE_STEP = 1.015, 1.4
SINGLE_TAIL = 0.01
"""Share of the energy that must be left out (a relative error of 0.1) for a spectrum to be computed in float32."""
HALVED_SIZE = 128
"""From this side on, half of a Gram matrix is left out (5/8 are multiplied, in four strips)."""
CUTS = ((3, 4), (4, 3), (3, 3), (2, 4), (4, 2), (2, 2))
"""Quarters of two folded modes that menus offer besides both in full."""


def balanced_factors(n: int) -> tuple[int, int]:
    """The two factors of `n` that are nearest to each other, the smaller first; (1, n) for a prime."""
    small = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return small, n // small


def rank_triples(first: int, last: int, top: Callable[[int, int], int]) -> Iterator[tuple[int, int, int]]:
    """Ranks of two folded modes and of the rest, `top(first, last)` being the most that these leave to the rest.

    Both modes in full with finely spaced ranks of the rest, then one or both cut by quarters with coarse ones.
    """
    outer = dict.fromkeys((max(1, first * a // 4), max(1, last * b // 4)) for a, b in ((4, 4), *CUTS))
    for a, b in outer:
        step = FINE_STEP if (a, b) == (first, last) else COARSE_STEP
        yield from ((a, b, rank) for rank in _spaced(top(a, b), step))


def _spaced(top: int, step: float) -> Iterator[int]:
    """1 to `top`, neighbours at most a factor `step` apart where integers allow it."""
    rank = 1
    while rank < top:
        yield rank
        rank = max(rank + 1, int(rank * step))
    yield top


def row_gram(matrix: Tensor) -> Tensor:
    """matrix @ matrix.T in the matrix's dtype; of a large one, only what is on and above the diagonal is multiplied."""
    n = len(matrix)
    if n < HALVED_SIZE:
        return matrix @ matrix.T
    gram = matrix.new_empty(n, n)
    for strip in strips(n, 4):
        torch.matmul(matrix[strip], matrix[strip.start :].T, out=gram[strip, strip.start :])
        gram[strip.stop :, strip] = gram[strip, strip.stop :].T
    return gram


def strips(n: int, count: int) -> Iterator[slice]:
    """Rows of a symmetric matrix (n, n) in so many strips, or in one if it is small.

    From the diagonal on, they hold (count + 1) / (2 * count) of it.
    """
    step = -(-n // (count if n >= HALVED_SIZE else 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def gram(matrix: Tensor, chunk: int = 1024) -> Tensor:
    """matrix.T @ matrix in float64, in chunks, so that the float64 copy stays small."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(chunk):
        total += row_gram(rows.double().T)
    return total


@final
class Unfolding:
    """Left singular vectors and values of a matrix (n, rest), leading first, from the Gram matrix of its short side.

    The matrix itself is not kept (an unfolding may be a copy as large as the weight): it is passed in again.
    `basis @ coordinates` of all components is the matrix; there are min(n, rest) components.
    """

    def __init__(self, matrix: Tensor, leading: int | None = None) -> None:
        """Analyse a matrix.

        Args:
            leading: only as many components will be asked for. If the others hold at least SINGLE_TAIL of the energy,
                the matrix's own dtype is enough: float32 blurs small components only, in half the time of float64.
        """
        self._tall = matrix.shape[0] > matrix.shape[1]
        self.sound = min(matrix.shape)  # components that can be relied on and are at hand
        values, self._vectors = self._eigen(matrix, leading)
        self.energies: Tensor = values.clamp_min(0)  # squared singular values, float64

    def keep(self, k: int) -> None:
        """Forget all but the first k vectors to save memory; asking for more later computes them again."""
        self.sound = min(self.sound, k)
        if k < self._vectors.shape[1]:
            self._vectors = self._vectors[:, :k].clone()

    def _eigen(self, matrix: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor]:
        """Squared singular values, and right singular vectors if tall, else left ones; leading first."""
        side = matrix if self._tall else matrix.T
        if leading is not None and leading < side.shape[1]:
            values, vectors = torch.linalg.eigh(row_gram(side.T))
            values = values.double()
            if float(values[:-leading].sum()) >= SINGLE_TAIL * float(values.sum()):
                self.sound = leading
                return values.flip(0), vectors.flip(-1)
        values, vectors = torch.linalg.eigh(gram(side))
        return values.flip(0), vectors.flip(-1).to(matrix.dtype)

    def _leading(self, matrix: Tensor, k: int) -> Tensor:
        if self._vectors.shape[1] < min(k, len(self.energies)):
            self._vectors = self._eigen(matrix)[1]
        return self._vectors[:, :k]

    def coordinates(self, matrix: Tensor, k: int) -> Tensor:
        """(k, rest): the matrix in the first k basis vectors; row j has norm sqrt(energies[j])."""
        vectors = self._leading(matrix, k)
        if not self._tall:
            return vectors.T @ matrix
        return self.energies[:k, None].sqrt().to(matrix.dtype) * vectors.T

    def basis(self, matrix: Tensor, k: int) -> Tensor:
        """(n, k): orthonormal columns, zero ones for components that are rounding noise of a tall matrix."""
        vectors = self._leading(matrix, k)
        if not self._tall:
            return vectors
        values = self.energies[:k]
        sound = values > self.energies[0] * torch.finfo(torch.float64).eps
        return matrix @ (vectors * torch.where(sound, values.rsqrt(), 0.0).to(matrix.dtype))
