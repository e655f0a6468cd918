"""Weighted Kronecker sums by alternating least squares: one weight, one grid, any number of terms.

W ~ sum_k small_k (x) wide_k. With either factor given the other is a linear least-squares problem, so the weighted
error never rises. Written here for the small factor on the left, blocks W_ij of r x s and C_jm of s x s; a grid with
the small factor on the right only cuts otherwise. The rows' moment enters as a product P (x) Q of p x p and r x r:

- wide from small: sum_k wide_k N_kl = T_l, N_kl = sum_jm (small_k^T P small_l)_jm C_jm, T_l = sum_ij (P small_l)_ij
  (W C)_ij; Q cancels;
- small from wide: sum_kj small_k,ij g_kj,lm = h_i,lm, g_kj,lm = <wide_k C_jm, Q wide_l>, h_i,lm = <(W C)_im, Q wide_l>;
  P cancels.

That is exact for R = I and for p = 1 (an embedding). For another R the nearest product is fitted first, and then R
itself (kron_refine.py).

Sources: Van Loan and Pitsianis 1993 for alternating fits and nearest products; Xu and Yin, SIAM J. Imaging Sciences 6
(2013), for proximal steps; the normal equations in blocks of C are ours.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core.extrapolation import step_length
from compresskit.core.folding import row_gram
from compresskit.core.grids import Grid, cut
from compresskit.core.metric import Metric, Moment

PROXIMAL = 1e-9
"""Weight of the distance from the last iterate, as a share of the mean diagonal of the normal equations: keeps them
regular and moves no fixed point."""
ENOUGH = 1e-3
"""A round that lowers the error by a smaller share is the last one."""
NEAREST_ROUNDS = 2
"""Power iterations for the nearest product P (x) Q of the rows' moment."""


class State(NamedTuple):
    """A sum of `terms` products and its weighted error; the small factors are orthonormal to each other."""

    small: Tensor  # (terms, p * q)
    wide: Tensor  # (terms, r, s)
    error: float

    def beyond(self, before: "State", length: float) -> "State":
        """With wide factors further along the way from `before`."""
        return State(self.small, torch.lerp(before.wide, self.wide, 1 + length), self.error)


@final
class Blocks:
    """A weight and its metric on one grid, in float64."""

    def __init__(self, weight: Tensor, answers: Tensor, metric: Metric, grid: Grid) -> None:
        """Cut everything.

        Args:
            weight: W (rows, cols), float64.
            answers: W C.
        """
        self.grid = grid
        self.size = (grid.p, grid.q, -(-weight.shape[0] // grid.p), weight.shape[1] // grid.q)
        q, r = grid.q, self.size[2]
        cols = metric.cols.dense(weight.shape[1], like=weight)
        self.cols = cut(cols, Grid(grid.left, q, q))  # C_jm: (q * q, s * s)
        self.outer, self.inner = _nearest_product(metric.rows, grid, r, weight)  # P and Q
        self.blocks = cut(weight, grid)  # (p * q, r * s)
        self.answers = cut(answers, grid)
        self.weighted_answers = self.weigh_inner(self.answers)
        self.exact = metric.rows.is_identity or grid.p == 1
        self.energy = float((self.weigh_outer(self.blocks) * self.weighted_answers).sum())

    def weigh_outer(self, blocks: Tensor) -> Tensor:
        """P applied to blocks or small factors (..., p * q, n)."""
        if self.outer.is_identity:
            return blocks
        return self.outer.before(blocks.reshape(self.grid.p, -1)).view_as(blocks)

    def weigh_inner(self, wide: Tensor) -> Tensor:
        """Q applied to the rows of wide factors or blocks (n, r * s)."""
        _, _, r, s = self.size
        if self.inner.values is None:
            return wide
        grid = wide.view(-1, r, s)
        values = self.inner.values
        return (values[:, None] * grid if values.dim() == 1 else values @ grid).view_as(wide)

    def start(self, terms: int) -> State:
        """The better of two: small factors of the plain fit, and those of a plain fit of the answers W C.

        The wide factors are already the best for the small ones, so it is no worse than the plain fit. The second start
        saves many rounds where few inputs outweigh the others.
        """
        of_answers = _leading(self.weighted_answers, terms)
        return min(self.with_small(self.plain(terms)), self.with_small(of_answers), key=lambda state: state.error)

    def plain(self, terms: int) -> Tensor:
        """Small factors (terms, p * q) of the plain fit."""
        return _leading(self.blocks, terms)

    def with_small(self, small: Tensor, last: Tensor | None = None) -> State:
        """The best wide factors for these small ones (terms, p * q).

        Args:
            last: wide factors (terms, r, s) to stay near to.
        """
        (_, q, r, s), k = self.size, len(small)
        if q == 1:
            return self._with_column(small)
        target = by_rows((self.weigh_outer(small.T).T @ self.answers).view(k, r, s))
        start = None if last is None else by_rows(last)
        wide, gained = _solve(self.normal_of_small(small), target, start, self.inner)
        return State(small, by_terms(wide, k), max(self.energy - gained, 0.0))

    def _with_column(self, small: Tensor) -> State:
        """The same where every block holds all columns (q = 1): C cancels."""
        weighted = self.weigh_outer(small.T).T
        wide = torch.linalg.solve(weighted @ small.T, weighted @ self.blocks)
        gained = float(((weighted @ self.weighted_answers) * wide).sum())
        return State(small, wide.view(len(small), *self.size[2:]), max(self.energy - gained, 0.0))

    def normal_of_small(self, small: Tensor) -> Tensor:
        """N (terms * s, terms * s)."""
        (p, q, _, s), k = self.size, len(small)
        weighted = self.weigh_outer(small.T).T.reshape(k, p, q)
        pairs = torch.einsum("kij,lim->kljm", weighted, small.reshape(k, p, q))
        return (pairs.reshape(k * k, q * q) @ self.cols).view(k, k, s, s).transpose(1, 2).reshape(k * s, k * s)

    def with_wide(self, state: State) -> State:
        """The best small factors for the wide ones of a state, not orthonormal."""
        (p, q, _, _), k = self.size, len(state.small)
        target = by_rows((state.wide.reshape(k, -1) @ self.weighted_answers.T).view(k, p, q))
        start = by_rows(state.small.reshape(k, p, q))
        small, gained = _solve(self.normal_of_wide(state.wide), target, start, self.outer)
        return State(by_terms(small, k).reshape(k, p * q), state.wide, max(self.energy - gained, 0.0))

    def normal_of_wide(self, wide: Tensor) -> Tensor:
        """g (terms * q, terms * q)."""
        (_, q, _, s), k = self.size, len(wide)
        if q == 1:
            return (wide @ self.cols.view(s, s)).flatten(1) @ self.weigh_inner(wide.flatten(1)).T
        side = by_rows(wide)
        pairs = (side.T @ self.inner.before(side)).view(k, s, k, s).transpose(1, 2)  # <wide_k, Q wide_l> by columns
        return (pairs.reshape(k * k, s * s) @ self.cols.T).view(k, k, q, q).transpose(1, 2).reshape(k * q, k * q)

    def descend(self, state: State, rounds: int) -> State:
        """At most so many rounds of both steps; stops where they gain no more. Never worse than it was given.

        Each starts from wide factors that are extrapolated along their last change, or if that did not pay, from what
        the one before it started from.
        """
        before, length = None, 0
        for _ in range(rounds):
            ahead = state if before is None else state.beyond(before, step_length(length))
            small, wide = orthonormal(self.with_wide(ahead))
            new = self.with_small(small, wide if before is None else None)  # nothing unseen is extrapolated for ever
            if not new.error < state.error:
                if before is None:
                    break
                before, length = None, 0
                continue
            enough = state.error - new.error < ENOUGH * state.error
            before, state, length = state, new, length + 1
            if enough:
                break
        return state


def _leading(blocks: Tensor, terms: int) -> Tensor:
    """Left singular vectors of blocks (p * q, r * s), one a row."""
    vectors: Tensor = torch.linalg.eigh(row_gram(blocks)).eigenvectors
    return vectors[:, -terms:].flip(-1).T


def by_rows(factors: Tensor) -> Tensor:
    """Factors (terms, n, m) beside each other: (n, terms * m)."""
    k, n, m = factors.shape
    return factors.transpose(0, 1).reshape(n, k * m)


def by_terms(matrix: Tensor, terms: int) -> Tensor:
    """The way back."""
    return matrix.view(len(matrix), terms, -1).transpose(0, 1)


def orthonormal(state: State) -> tuple[Tensor, Tensor]:
    """Small and wide factors of the same sum, the small ones orthonormal and turned no more than it takes."""
    q, r = torch.linalg.qr(state.small.T)  # small = r.T @ q.T
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return (q * signs).T.contiguous(), torch.einsum("jk,krs->jrs", signs[:, None] * r, state.wide)


def _solve(normal: Tensor, target: Tensor, start: Tensor | None, weigh: Moment) -> tuple[Tensor, float]:
    """X (n, m) of least <weigh X, X normal> - 2 <weigh X, target>, near `start`, and how far below 0 that is.

    Writes `normal` (m, m).
    """
    step = PROXIMAL * float(normal.diagonal().mean()) or 1.0
    pull = target if start is None else target - start @ normal
    normal.diagonal().add_(step)  # in place: it may be large
    factor = torch.linalg.cholesky(normal)
    moved = torch.cholesky_solve(pull.T, factor).T
    found = moved if start is None else start + moved
    return found, float((weigh.before(target + step * moved) * found).sum())


def _nearest_product(rows: Moment, grid: Grid, r: int, weight: Tensor) -> tuple[Moment, Moment]:
    """P (p x p) and Q (r x r) with P (x) Q next to the rows' moment, padded rows of weight 1."""
    p = grid.p
    if rows.values is None:
        return Moment(None), Moment(None)
    if p == 1:
        return Moment(None), rows
    if rows.values.dim() == 1:
        parts = F.pad(rows.values, (0, p * r - len(weight)), value=1.0)
        parts = parts.view(p, r) if grid.left else parts.view(r, p).T
        outer = parts.new_ones(p)
    else:
        parts = cut(padded(rows.values, p * r), Grid(grid.left, p, p))
        outer = torch.eye(p, dtype=parts.dtype, device=parts.device).flatten()
    for _ in range(NEAREST_ROUNDS):
        inner = outer @ parts / outer.square().sum()
        outer = parts @ inner / inner.square().sum()
    if rows.values.dim() == 1:
        return Moment(outer), Moment(inner)
    return Moment(outer.view(p, p)), Moment(inner.view(r, r))


def padded(rows: Tensor, size: int) -> Tensor:
    """A moment (rows, rows) with further rows of weight 1."""
    wide = torch.eye(size, dtype=rows.dtype, device=rows.device)
    wide[: len(rows), : len(rows)] = rows
    return wide
