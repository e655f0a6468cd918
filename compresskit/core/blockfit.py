"""Alternating least squares for W ~ U_i diag(s_ij) V_j^T in block (i, j), weighted by second moments if there are any.

The error tr(R D C D^T) of D = W - approximation is a quadratic function of the left bases U, of the right bases V and
of the scales s, each with the other two fixed. Each step goes along the exact solution of a problem without coupling
between blocks, as far as lowers the true error most, so that no step raises it. Between rounds all three are
extrapolated along their last change (extrapolation.py), and put back where that did not pay.

Of the difference only F = D C is kept. C is multiplied with the right bases, V_j^T C, which have fewer rows than the
weight, and everything else follows from these: on 384 x 1536 weights at 4 times fewer parameters a fifth of the time
of D C itself.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from compresskit.core.extrapolation import step_length
from compresskit.core.metric import Moment

RIDGE = 1e-6
"""Share of the mean of a Gram matrix's diagonal that is added to it: bases may be linearly dependent."""
SHAKE = 0.03
"""Noise that a start is given, as a share of each component's size."""
MANY = 64
"""From so many right-hand sides on, multiplying with the inverse takes half of the time of solving for them."""
AT_ONCE = 2**20
"""Entries of Gram matrices that are made in one operation: with small blocks calls take longer than products."""
PATIENCE = 4
"""So many times the rounds are made at most to reach an error that is asked for."""


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """Factors of a weight in p x q blocks of (m, n).

    Args:
        left: U (p, m, rank).
        scales: s (p, q, rank).
        right: V (q, n, rank).
    """

    left: Tensor
    scales: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """(p * m, q * n)."""
        (p, m, _), (q, n, _) = self.left.shape, self.right.shape
        return torch.bmm(self.left, _row_bases(self.right, self.scales)).view(p * m, q * n)

    def times(self, factor: float) -> "Blocks":
        return Blocks(self.left * factor, self.scales, self.right)

    def weighed(self, rows: Moment, cols: Moment) -> "Blocks":
        """Of rows @ weight @ cols."""
        left, right = rows.before(self.left.flatten(0, 1)), cols.before(self.right.flatten(0, 1))
        return Blocks(left.view_as(self.left), self.scales, right.view_as(self.right))

    def transposed(self) -> "Blocks":
        """Of the transposed weight."""
        return Blocks(self.right, self.scales.transpose(0, 1).contiguous(), self.left)

    def beyond(self, before: "Blocks", length: float) -> "Blocks":
        """Further along the way from `before`."""
        return Blocks(
            torch.lerp(before.left, self.left, 1 + length),
            torch.lerp(before.scales, self.scales, 1 + length),
            torch.lerp(before.right, self.right, 1 + length),
        )


@final
class BlockFit:
    """One weight to fit, of any scale, with what all fits of it share.

    Rows or columns that are weighted one by one are scaled, and need no weights then. Independent rows that outnumber
    the columns p times, as in an embedding, are reduced to what they span: with the rows of a block W_i = Q_i T_i, its
    bases are Q_i times those of the small T_i.
    """

    def __init__(self, weight: Tensor, blocks: tuple[int, int], rows: Moment, cols: Moment) -> None:
        """Prepare.

        Args:
            weight: (rows, cols), cut in so many blocks along both.
            rows, cols: R and C; float64 keeps the smallest weights of rows apart from none.
        """
        self._scales = _root(rows, weight), _root(cols, weight)
        self._inverses = _root(rows, weight, inverse=True), _root(cols, weight, inverse=True)
        scaled = self._scales[1].after(self._scales[0].before(weight))
        sides = _full(rows, weight), _full(cols, weight)
        self._turned = sides[1].is_identity and not sides[0].is_identity
        self._tall = sides[0].is_identity and len(weight) > blocks[0] * weight.shape[1]
        small = scaled.T.contiguous() if self._turned else scaled
        if self._tall:
            small = torch.linalg.qr(scaled.unflatten(0, (blocks[0], -1)), mode="r").R.flatten(0, 1)
        self._scaled = scaled if self._tall else None
        self._problem = _Problem.of(small, *(reversed(sides) if self._turned else sides))

    def error(self, start: Blocks, rounds: int) -> float:
        """The error after so many rounds."""
        return max(self._search(start, rounds)[1], 0.0)

    def refine(self, start: Blocks, rounds: int, *, until: float = math.inf) -> Blocks:
        """Factors with an error that is not above that of the start, after so many rounds.

        Args:
            until: a squared error, as `error` measures it; if it is not reached, the search goes on up to PATIENCE
                times as long.
        """
        found = self._search(start, rounds, until)[0]
        if self._scaled is not None:
            found = _Problem.of(self._scaled, Moment(None), self._problem.cols).with_left(found)
        found = found.transposed() if self._turned else found
        return found.weighed(*self._inverses)

    def _search(self, start: Blocks, rounds: int, until: float = math.inf) -> tuple[Blocks, float]:
        start = start.weighed(*self._scales)
        start = start.transposed() if self._turned else start
        return _refined(self._problem, self._problem.with_left(start) if self._tall else start, rounds, until)


def _root(moment: Moment, like: Tensor, *, inverse: bool = False) -> Moment:
    """The square root of a diagonal moment, or its inverse; the identity for any other."""
    if moment.values is None or moment.values.dim() == 2:
        return Moment(None)
    return Moment.of((moment.inverse_root() if inverse else moment.root()).values, like=like)


def _full(moment: Moment, like: Tensor) -> Moment:
    """A moment that is no diagonal; the identity for any other."""
    return Moment(None) if moment.values is None or moment.values.dim() == 1 else Moment.of(moment.values, like=like)


@final
@dataclass(frozen=True, eq=False)
class _Problem:
    """A weight W (p * m, q * n) and the moments of its sides, each full or the identity; R is full only beside C."""

    weight: Tensor
    rows: Moment
    cols: Moment
    answers: Tensor  # W C

    @classmethod
    def of(cls, weight: Tensor, rows: Moment, cols: Moment) -> "_Problem":
        return cls(weight, rows, cols, cols.after(weight))

    def with_left(self, blocks: Blocks) -> Blocks:
        """The best left bases for the others, where R is the identity."""
        bases = _row_bases(blocks.right, blocks.scales)
        if self.cols.is_identity:
            grams = _grams(_own_grams(blocks.right, self.cols), blocks.scales)
        else:
            grams = torch.bmm(_mixed(self.seen(blocks.right.mT), blocks.scales), bases.mT)
        wanted = torch.bmm(self.answers.view(len(bases), -1, bases.shape[2]), bases.mT).mT
        left = _solved(grams, wanted)
        left = (left + _solved(grams, wanted - torch.bmm(grams, left))).mT  # what is raised does not count then
        return Blocks(left.contiguous(), blocks.scales, blocks.right)

    def seen(self, right: Tensor) -> Tensor:
        """V_j^T C of these V_j^T (q, rank, n), for all columns: (q, rank, q * n)."""
        assert self.cols.values is not None
        return torch.bmm(right, self.cols.values.view(len(right), right.shape[2], -1))


def _refined(problem: _Problem, start: Blocks, rounds: int, until: float) -> tuple[Blocks, float]:
    """The best that was found, and its error."""
    best, before = _Descent(problem, start), None
    least = best.error
    kept = best.place()
    here = _Descent(problem, _shaken(start))
    for number in range(PATIENCE * rounds):
        if number >= rounds and least <= until:
            break
        here.scales_step()
        here.right_step()
        here.left_step()
        if here.error > least:  # the extrapolation did not pay
            here = _Descent(problem, *kept)
            before = None
            continue
        before, kept, least = (kept if number else None), here.place(), here.error
        if before is not None and (number + 1 < rounds or least > until):
            here = here.beyond(before, step_length(number + 1))
    return kept[0], _Descent(problem, *kept).error  # what was subtracted step by step has drifted


def _shaken(blocks: Blocks) -> Blocks:
    """The factors with some noise: those of an SVD can be a saddle, that of a block-diagonal matrix is one."""
    generator = torch.Generator().manual_seed(0)

    def shake(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return tensor + SHAKE * noise * tensor.square().mean((0, 1)).sqrt()

    return Blocks(shake(blocks.left), shake(blocks.scales), shake(blocks.right))


Place = tuple[Blocks, Tensor | None]


class _Descent:
    """Where the descent is: factors, V^T C where C is full, D C of the difference D that is left, and its error."""

    def __init__(self, problem: _Problem, blocks: Blocks, seen: Tensor | None = None) -> None:
        self._problem = problem
        self._coupled = not problem.cols.is_identity
        self.blocks = blocks
        self._seen = problem.seen(blocks.right.mT) if self._coupled and seen is None else seen
        p, m, _ = blocks.left.shape
        bases = _row_bases(blocks.right, blocks.scales)
        difference = torch.baddbmm(problem.weight.view(p, m, -1), blocks.left, bases, alpha=-1)
        self._left_over = (
            torch.baddbmm(problem.answers.view(p, m, -1), blocks.left, self._mixed(blocks.scales), alpha=-1)
            if self._coupled
            else difference
        )
        self.error = _dot(difference, self._weighed(self._left_over))

    def place(self) -> Place:
        return self.blocks, self._seen

    def beyond(self, before: Place, length: float) -> "_Descent":
        """Further along the way from `before`."""
        seen = None if before[1] is None or self._seen is None else torch.lerp(before[1], self._seen, 1 + length)
        return _Descent(self._problem, self.blocks.beyond(before[0], length), seen)

    def left_step(self) -> None:
        b = self.blocks
        bases = _row_bases(b.right, b.scales)
        if self._coupled:
            seen = self._mixed(b.scales)
            grams = torch.bmm(seen, bases.mT)
        else:
            seen, grams = bases, _grams(_own_grams(b.right, self._problem.cols), b.scales)
        slopes = torch.bmm(self._left_over, bases.mT)
        change = _solved(grams, slopes.mT).mT
        if self._problem.rows.is_identity:
            length = _length(_dot(change, slopes), _dot(change, torch.bmm(change, grams)))
            self._left_over.baddbmm_(change, seen, alpha=-length)
            self.error -= length * _dot(change, slopes)
        else:
            weighed, moved = self._weighed(torch.bmm(change, bases)), torch.bmm(change, seen)
            length = self._move(moved, _dot(weighed, self._left_over), _dot(weighed, moved))
        self.blocks = Blocks(b.left + length * change, b.scales, b.right)

    def right_step(self) -> None:
        b, problem = self.blocks, self._problem
        bases = (b.left * b.scales.transpose(0, 1)[:, :, None]).flatten(1, 2)  # (q, p * m, rank)
        if problem.rows.is_identity:
            weighed, grams = bases, _grams(_own_grams(b.left, problem.rows), b.scales.transpose(0, 1))
        else:
            weighed = torch.matmul(problem.rows.dense(bases.shape[1], like=bases), bases)
            grams = torch.bmm(weighed.mT, bases)
        wanted = torch.baddbmm(self._by_cols(weighed, problem.weight), grams, b.right.mT, alpha=-1)
        change = _solved(grams, wanted)  # (q, rank, n)
        if self._coupled:
            seen = problem.seen(change)
            moved = torch.bmm(b.left, _mixed(seen, b.scales))
            grid = self._weighed(torch.bmm(b.left, _row_bases(change.mT, b.scales)))
            slope, curvature = _dot(grid, self._left_over), _dot(grid, moved)
        else:
            seen, moved = None, torch.bmm(b.left, _row_bases(change.mT, b.scales))
            slope, curvature = _dot(change, wanted), _dot(change, torch.bmm(grams, change))
        length = self._move(moved, slope, curvature)
        self.blocks = Blocks(b.left, b.scales, b.right + length * change.mT)
        if seen is not None and self._seen is not None:
            self._seen = self._seen.add(seen, alpha=length)

    def scales_step(self) -> None:
        b, problem = self.blocks, self._problem
        grams = _own_grams(b.left, problem.rows)[:, None] * _own_grams(b.right, problem.cols)
        slopes = self._by_blocks(self._left_over)
        change = _solved(grams, slopes[..., None])[..., 0]
        if self._coupled:
            moved = torch.bmm(b.left, self._mixed(change))
            curvature = _dot(change, self._by_blocks(moved))
        else:
            moved = torch.bmm(b.left, _row_bases(b.right, change))
            curvature = _dot(change, torch.matmul(grams, change[..., None])[..., 0])
        length = self._move(moved, _dot(change, slopes), curvature)
        self.blocks = Blocks(b.left, b.scales + length * change, b.right)

    def _move(self, moved: Tensor, slope: float, curvature: float) -> float:
        """Go as far along a change as lowers the error most; returns how far. `moved`: the change times C."""
        length = _length(slope, curvature)
        self._left_over.sub_(moved, alpha=length)
        self.error -= length * slope
        return length

    def _weighed(self, grid: Tensor) -> Tensor:
        """R times (p, m, q * n)."""
        return self._problem.rows.before(grid.flatten(0, 1)).view_as(grid)

    def _mixed(self, scales: Tensor) -> Tensor:
        assert self._seen is not None
        return _mixed(self._seen, scales)

    def _by_cols(self, bases: Tensor, matrix: Tensor) -> Tensor:
        """bases_j^T times column block j: (q, p * m, rank) -> (q, rank, n)."""
        grid = matrix.view(bases.shape[1], len(bases), -1).transpose(0, 1)
        return torch.bmm(bases.mT, grid)

    def _by_blocks(self, grid: Tensor) -> Tensor:
        """Diagonals of U_i^T (R grid)_ij V_j: (p, m, q * n) -> (p, q, rank)."""
        b = self.blocks
        inner = torch.bmm(b.left.mT, self._weighed(grid))  # (p, rank, q * n)
        q, n, _ = b.right.shape
        return (inner.view(*inner.shape[:2], q, n) * b.right.permute(2, 0, 1)).sum(-1).mT


def _row_bases(right: Tensor, scales: Tensor) -> Tensor:
    """diag(s_ij) V_j^T of all j side by side: (p, rank, q * n)."""
    p, _, rank = scales.shape
    return (scales.mT.contiguous()[..., None] * right.permute(2, 0, 1).contiguous()).view(p, rank, -1)


def _mixed(seen: Tensor, scales: Tensor) -> Tensor:
    """Sums over j of diag(s_ij) times these (q, rank, n): (p, rank, n)."""
    return torch.bmm(scales.permute(2, 0, 1), seen.transpose(0, 1)).transpose(0, 1)


def _own_grams(bases: Tensor, moment: Moment) -> Tensor:
    """B_j^T M_jj B_j of each block, M full or the identity: (blocks, n, rank) -> (blocks, rank, rank)."""
    count, n, _rank = bases.shape
    if moment.values is None:
        return torch.bmm(bases.mT, bases)
    own = moment.values.view(count, n, count, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.bmm(bases.mT, torch.bmm(own, bases))


def _grams(own: Tensor, scales: Tensor) -> Tensor:
    """For each i, the sum over j of diag(s_ij) own_j diag(s_ij): scales (p, q, rank) -> (p, rank, rank)."""
    parts = scales.split(max(1, AT_ONCE // own.numel()))
    return torch.cat([(s[..., None] * own).mul_(s[:, :, None]).sum(1) for s in parts])


def _solved(grams: Tensor, right_sides: Tensor) -> Tensor:
    """grams^-1 @ right_sides, the diagonals raised a little."""
    raised = grams.clone()
    diagonal = raised.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, RIDGE * mean, 1.0))
    factor = torch.linalg.cholesky_ex(raised).L
    if right_sides.shape[-1] < MANY:
        return torch.cholesky_solve(right_sides, factor)
    return torch.bmm(torch.cholesky_inverse(factor), right_sides)


def _length(slope: float, curvature: float) -> float:
    return slope / curvature if curvature > 0 else 0.0


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
