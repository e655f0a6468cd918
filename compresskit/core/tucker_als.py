"""Weighted Tucker decompositions of a matrix of which one side is folded to two modes, by alternating least squares.

W (n1 n2, cols) ~ (U1 (x) U2) Z with Z of rank q. The moment of the side that is not folded is taken into the weight:
only S S^T = W C W^T matters for U1, U2 and the left half of Z. With U1 and U2 given, the best Z is a truncated SVD, and
its spectrum prices all q at once; with Z and one of them given, the other is a linear least-squares problem. So the
weighted error never rises; without a moment of the folded side this is HOOI of the whitened weight.

Sources: De Lathauwer, De Moor and Vandewalle 2000 (HOSVD for the start, HOOI); Kroonenberg and de Leeuw, Psychometrika
45 (1980), for alternating least squares; the steps with a moment that couples folded rows are ours.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor

from compresskit.core.metric import Metric

PROXIMAL = 1e-9
"""Weight of the distance from the last iterate, as a share of the mean diagonal of the normal equations."""

Pair = tuple[int, int]


class Bases(NamedTuple):
    """Orthonormal U1 (n1, r1) and U2 (n2, r2); a square one is the identity."""

    first: Tensor
    last: Tensor


class TuckerState(NamedTuple):
    """(U1 (x) U2) @ left @ right; left has rank columns, orthonormal in the metric of the folded side."""

    first: Tensor
    last: Tensor
    left: Tensor  # (r1 * r2, rank)
    error: float  # weighted


@final
class FoldedTucker:
    """A weight (n1 * n2, cols) and its metric, in float64. Transpose both to fold the columns."""

    def __init__(self, weight: Tensor, metric: Metric, modes: Pair) -> None:
        self._weight = weight.double()
        self._modes = modes
        self._rows = metric.rows
        self._whitened = _whitened(weight, metric)  # S (n1 * n2, k)
        self._weighed = metric.rows.before(self._whitened)  # R S
        self._energy = float((self._whitened * self._weighed).sum())
        self._known: dict[Pair, tuple[Bases, ...]] = {}

    def errors(self, ranks: Pair) -> list[float]:
        """Weighted error of rank 0, 1, ... of the other side, with U1 and U2 of these ranks from the better start."""
        kept = []
        for bases in self._starts(ranks):
            values = torch.linalg.eigvalsh(_small_gram(self._coordinates(bases)[1])).clamp_min(0)
            kept.append([0.0, *values.flip(0).cumsum(0).tolist()])
        return [max(self._energy - max(energies), 0.0) for energies in zip(*kept, strict=True)]

    def fit(self, ranks: Pair, rank: int, sweeps: int) -> TuckerState:
        """From the better start, so many sweeps over the modes that are cut; the best state on the way."""
        starts = [self._with_bases(bases, rank) for bases in self._starts(ranks)]
        state = min(starts, key=lambda start: start.error)
        if ranks == self._modes:
            return state
        for _ in range(sweeps):
            new = self._sweep(state, rank)
            if not new.error < state.error:
                break
            state = new
        return state

    def right(self, state: TuckerState) -> Tensor:
        """The best right half (rank, cols) for a state, in the columns of the weight itself: takes no inverse of C."""
        return state.left.T @ _down(state, self._rows.before(self._weight))

    def whole(self, state: TuckerState) -> Tensor:
        """The best Z (r1 * r2, cols) without a limit on its rank."""
        root, _ = self._coordinates(state)
        sides = _down(state, self._rows.before(self._weight))
        return sides if root is None else torch.cholesky_solve(sides, root)

    def _starts(self, ranks: Pair) -> tuple[Bases, ...]:
        """Bases of the HOSVD of the whitened weight, and of the plain one: no worse than a plain HOSVD then."""
        if ranks not in self._known:
            bases = [self._hosvd(matrix, ranks) for matrix in (self._whitened, self._weight)]
            self._known[ranks] = tuple(bases[:1] if ranks == self._modes else bases)
        return self._known[ranks]

    def _hosvd(self, matrix: Tensor, ranks: Pair) -> Bases:
        tensor = matrix.reshape(*self._modes, -1)
        grams = (torch.einsum("ijk,ljk->il", tensor, tensor), torch.einsum("ijk,ilk->jl", tensor, tensor))
        first, last = (
            torch.eye(n, dtype=gram.dtype, device=gram.device) if r == n else _leading(gram, r)
            for n, r, gram in zip(self._modes, ranks, grams, strict=True)
        )
        return Bases(first, last)

    def _coordinates(self, bases: "Bases | TuckerState") -> tuple[Tensor | None, Tensor]:
        """Cholesky root L of N = U^T R U (None: the identity), and L^-1 U^T R S (r1 * r2, k)."""
        targets = _down(bases, self._weighed)
        if self._rows.is_identity:
            return None, targets
        moment = self._rows.dense(len(self._weight), like=self._weight)
        root = torch.linalg.cholesky(_down(bases, _down(bases, moment).T))
        return root, torch.linalg.solve_triangular(root, targets, upper=False)

    def _with_bases(self, bases: Bases, rank: int) -> TuckerState:
        """The best Z for these U1 and U2, as its left half."""
        root, coordinates = self._coordinates(bases)
        if coordinates.shape[0] <= coordinates.shape[1]:
            left = _leading(coordinates @ coordinates.T, rank)
        else:
            left = torch.linalg.qr(coordinates @ _leading(coordinates.T @ coordinates, rank)).Q
        kept = float((left.T @ coordinates).square().sum())
        if root is not None:
            left = torch.linalg.solve_triangular(root.T, left, upper=True)
        return TuckerState(*bases, left, max(self._energy - kept, 0.0))

    def _sweep(self, state: TuckerState, rank: int) -> TuckerState:
        (n1, n2), r1, r2 = self._modes, state.first.shape[1], state.last.shape[1]
        if r1 < n1:
            fixed = torch.einsum("jb,abk->ajk", state.last, self._core(state))
            first = torch.linalg.qr(self._step(fixed, state.first, swapped=False)).Q
            state = self._with_bases(Bases(first, state.last), rank)
        if r2 < n2:
            fixed = torch.einsum("ia,abk->bik", state.first, self._core(state))
            last = torch.linalg.qr(self._step(fixed, state.last, swapped=True)).Q
            state = self._with_bases(Bases(state.first, last), rank)
        return state

    def _core(self, state: TuckerState) -> Tensor:
        """Z (r1, r2, k)."""
        core = state.left @ (state.left.T @ _down(state, self._weighed))
        return core.view(state.first.shape[1], state.last.shape[1], -1)

    def _step(self, fixed: Tensor, start: Tensor, *, swapped: bool) -> Tensor:
        """U (n, r) of least weighted error of sum_a U[i, a] fixed[a, j, :], near `start`; i is the mode to solve for.

        Args:
            fixed: (r, the other mode, k).
            swapped: the last mode is solved for.
        """
        n, (r, other, _) = len(start), fixed.shape
        order = (1, 0, 2) if swapped else (0, 1, 2)
        targets = self._weighed.view(*self._modes, -1).permute(order)  # (n, other, k)
        target = torch.einsum("ijk,ajk->ia", targets, fixed)
        values = self._rows.values
        if values is None:
            normal = fixed.flatten(1) @ fixed.flatten(1).T
            return _near(normal, target.T, start.T).T
        if values.dim() == 1:
            weights = values.view(self._modes).permute(order[:2])  # (n, other)
            pairs = torch.einsum("ajk,bjk->jab", fixed, fixed).flatten(1)
            normals = (weights @ pairs).view(n, r, r)
            return _near(normals, target[..., None], start[..., None]).squeeze(-1)
        (n1, n2), side = self._modes, fixed.flatten(0, 1)
        weights = values.view(n1, n2, n1, n2).permute((1, 3, 0, 2) if swapped else (0, 2, 1, 3)).reshape(n * n, -1)
        pairs = (side @ side.T).view(r, other, r, other).permute(1, 3, 0, 2).reshape(other * other, r * r)
        normal = (weights @ pairs).view(n, n, r, r).transpose(1, 2).reshape(n * r, n * r)
        return _near(normal, target.reshape(-1, 1), start.reshape(-1, 1)).view(n, r)


def _whitened(weight: Tensor, metric: Metric) -> Tensor:
    """S with S S^T = W C W^T and no more columns than needed, in float64."""
    if weight.shape[0] < weight.shape[1]:
        return metric.gram(weight).root().dense(len(weight), like=weight.double())
    return metric.cols.whitened(weight.double())


def _down(bases: "Bases | TuckerState", matrix: Tensor) -> Tensor:
    """(U1 (x) U2)^T @ matrix; a square basis is the identity."""
    (n1, r1), (n2, r2) = bases.first.shape, bases.last.shape
    tensor = matrix.reshape(n1, n2, -1)
    if r1 < n1:
        tensor = torch.einsum("ia,ijk->ajk", bases.first, tensor)
    if r2 < n2:
        tensor = torch.einsum("jb,ajk->abk", bases.last, tensor)
    return tensor.flatten(0, 1)


def _leading(gram: Tensor, k: int) -> Tensor:
    """Leading eigenvectors, one a column."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -k:].flip(-1)


def _small_gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _near(normal: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """X of least <X, normal X> - 2 <X, target>, near `start`; batches too."""
    step = PROXIMAL * float(normal.diagonal(dim1=-2, dim2=-1).mean()) or 1.0
    damped = normal + step * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return start + torch.cholesky_solve(target - normal @ start, torch.linalg.cholesky(damped))
