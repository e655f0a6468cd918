"""Alternating least squares for W ~ U_i diag(s_ij) V_j^T in block (i, j), weighted by second moments if there are any.

The error tr(R D C D^T) of D = W - approximation is a quadratic function of the left bases U, of the right bases V and
of the scales s, each with the other two fixed. Each step goes along the exact solution of a problem without coupling
between blocks, as far as lowers the true error most, so that no step raises it. Between rounds all three are
extrapolated along their last change, and put back where that did not pay (Rajih, Comon and Harshman, SIAM J. Matrix
Anal. Appl. 30 (2008), for tensors): ten rounds then do what 25 do without.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from compresskit.core.importance import Moment

RIDGE = 1e-6
"""Share of the mean of a Gram matrix's diagonal that is added to it: bases may be linearly dependent."""
SHAKE = 0.1
"""Noise that a start is given, as a share of each component's size."""
GROWTH = 1 / 3
"""Rounds to this power are the length of an extrapolation."""


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
        return torch.bmm(self.left, self.row_bases().mT).view(p * m, q * n)

    def row_bases(self) -> Tensor:
        """diag(s_ij) V_j^T of all j side by side, transposed: (p, q * n, rank)."""
        return (self.right * self.scales[:, :, None]).flatten(1, 2)

    def col_bases(self) -> Tensor:
        """U_i diag(s_ij) of all i below each other: (q, p * m, rank)."""
        return (self.left * self.scales.transpose(0, 1)[:, :, None]).flatten(1, 2)

    def beyond(self, before: "Blocks", length: float) -> "Blocks":
        """Further along the way from `before`."""
        return Blocks(
            torch.lerp(before.left, self.left, 1 + length),
            torch.lerp(before.scales, self.scales, 1 + length),
            torch.lerp(before.right, self.right, 1 + length),
        )


def refine(weight: Tensor, start: Blocks, rows: Moment, cols: Moment, rounds: int) -> Blocks:
    """Factors with an error that is not above that of the start, after this many rounds.

    Args:
        weight: (p * m, q * n), of any scale.
        rows, cols: R and C, in the dtype of the weight.
    """
    if len(weight) > len(start.left) * weight.shape[1] and (rows.values is None or rows.values.dim() == 1):
        return _refine_tall(weight, start, rows, cols, rounds)
    best, before = start, None
    least = _Descent(weight, rows, cols, start).error
    here = _Descent(weight, rows, cols, _shaken(start))
    for number in range(rounds):
        here.left_step()
        here.right_step()
        here.scales_step()
        if here.error > least:  # the extrapolation did not pay
            here = _Descent(weight, rows, cols, best)
            before = None
            continue
        before, best, least = (best if number else None), here.blocks, here.error
        if before is not None and number + 1 < rounds:
            here = _Descent(weight, rows, cols, best.beyond(before, (number + 1) ** GROWTH))
    return best


def _refine_tall(weight: Tensor, start: Blocks, rows: Moment, cols: Moment, rounds: int) -> Blocks:
    """The same where rows are independent and outnumber the columns p times, as in an embedding.

    With the weighted rows of a block R^(1/2) W_i = Q_i T_i, its bases are Q_i times those of the small T_i.
    """
    scaled = rows.root().before(weight).unflatten(0, (len(start.left), -1))
    small = torch.linalg.qr(scaled, mode="r").R.flatten(0, 1)
    found = refine(small, _with_left_of(small, start, cols), Moment(None), cols, rounds)
    both = start, _with_left_of(weight, found, cols)
    return min(both, key=lambda blocks: _Descent(weight, rows, cols, blocks).error)


def _with_left_of(weight: Tensor, blocks: Blocks, cols: Moment) -> Blocks:
    """The best left bases for the others, which do not depend on weights of single rows."""
    bases = blocks.row_bases()
    sides = torch.bmm(cols.after(weight).view(len(bases), -1, weight.shape[1]), bases)
    left = _solved(_grams(blocks.right, cols, blocks.scales), sides.mT).mT
    return Blocks(left.contiguous(), blocks.scales, blocks.right)


def _shaken(blocks: Blocks) -> Blocks:
    """The factors with some noise: those of an SVD can be a saddle, that of a block-diagonal matrix is one."""
    generator = torch.Generator().manual_seed(0)

    def shake(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return tensor + SHAKE * noise * tensor.square().mean((0, 1)).sqrt()

    return Blocks(shake(blocks.left), shake(blocks.scales), shake(blocks.right))


class _Descent:
    """Where the descent is: factors, the difference that they leave, and its error."""

    def __init__(self, weight: Tensor, rows: Moment, cols: Moment, blocks: Blocks) -> None:
        self._rows, self._cols = rows, cols
        self.blocks = blocks
        self._difference = weight - blocks.dense()
        self._weighted = rows.before(cols.after(self._difference))  # R D C
        self.error = float((self._difference * self._weighted).sum())

    def left_step(self) -> None:
        b = self.blocks
        bases = b.row_bases()
        grams = _grams(b.right, self._cols, b.scales)
        change = torch.bmm(self._cols.after(self._difference).view(len(b.left), -1, bases.shape[1]), bases)
        change = _solved(grams, change.mT).mT
        length = self._move(torch.bmm(change, bases.mT).view(self._difference.shape))
        self.blocks = Blocks(b.left + length * change, b.scales, b.right)

    def right_step(self) -> None:
        b = self.blocks
        bases = b.col_bases()
        grams = _grams(b.left, self._rows, b.scales.transpose(0, 1))
        sides = self._rows.before(self._difference).T.reshape(len(b.right), -1, bases.shape[1])
        change = _solved(grams, torch.bmm(sides, bases).mT).mT  # (q, n, rank)
        length = self._move(torch.bmm(change, bases.mT).view(self._difference.T.shape).T)
        self.blocks = Blocks(b.left, b.scales, b.right + length * change)

    def scales_step(self) -> None:
        b = self.blocks
        (p, m, _), (q, n, _) = b.left.shape, b.right.shape
        grams = _own_grams(b.left, self._rows)[:, None] * _own_grams(b.right, self._cols)
        grid = self._weighted.view(p, m, q, n).transpose(1, 2)
        slopes = (torch.matmul(b.left.mT[:, None], grid) * b.right.mT).sum(-1)  # (p, q, rank)
        change = _solved(grams, slopes[..., None])[..., 0]
        step = Blocks(b.left, change, b.right)
        length = self._move(step.dense())
        self.blocks = Blocks(b.left, b.scales + length * change, b.right)

    def _move(self, direction: Tensor) -> Tensor:
        """Go as far along a change of the approximation as lowers the error most; returns how far."""
        weighted = self._rows.before(self._cols.after(direction))
        slope, curvature = (direction * self._weighted).sum(), (direction * weighted).sum()
        length = torch.where(curvature > 0, slope / curvature, 0.0)
        self._difference = self._difference - length * direction
        self._weighted = self._weighted - length * weighted
        self.error -= float(length * slope)
        return length


def _own_grams(bases: Tensor, moment: Moment) -> Tensor:
    """B_j^T M_jj B_j of each block: (blocks, n, rank) -> (blocks, rank, rank)."""
    count, n, _rank = bases.shape
    values = moment.values
    if values is None:
        return torch.bmm(bases.mT, bases)
    if values.dim() == 1:
        return torch.bmm(bases.mT, bases * values.view(count, n, 1))
    own = values.view(count, n, count, n).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.bmm(bases.mT, torch.bmm(own, bases))


def _grams(bases: Tensor, moment: Moment, scales: Tensor) -> Tensor:
    """For each i, sum over j, k of diag(s_ij) B_j^T M_jk B_k diag(s_ik): scales (p, q, rank) -> (p, rank, rank)."""
    count, n, rank = bases.shape
    if moment.values is None or moment.values.dim() == 1:
        own = _own_grams(bases, moment)
        return torch.stack([(own * s[:, :, None] * s[:, None]).sum(0) for s in scales])
    columns = moment.values.view(-1, count, n).transpose(0, 1)  # (count, count * n, n)
    pairs = torch.bmm(columns, bases).view(count, count, n, rank)  # [k, j] = M_jk B_k
    pairs = torch.matmul(bases.mT, pairs)  # [k, j] = B_j^T M_jk B_k
    return torch.stack([((pairs * s[None, :, :, None]).sum(1) * s[:, None]).sum(0) for s in scales])


def _solved(grams: Tensor, right_sides: Tensor) -> Tensor:
    """grams^-1 @ right_sides, the diagonals raised a little."""
    raised = grams.clone()
    diagonal = raised.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, RIDGE * mean, 1.0))
    return torch.cholesky_solve(right_sides, torch.linalg.cholesky_ex(raised).L)
