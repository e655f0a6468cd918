"""Grids that a weight is cut in for a Kronecker fit, and the Gram matrices of their blocks.

The nearest Kronecker product follows from the Gram matrix of the blocks (Van Loan and Pitsianis 1993: the rearranged
weight times its transpose). The Gram matrix of a coarser grid is a partial trace of a finer one's, so a few fine grids
serve a whole menu.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

COPY_COST = 64
"""What a rearranged copy of the weight costs besides its Gram matrix, in sides of a Gram matrix."""


class Grid(NamedTuple):
    """How a weight is cut: the small factor is p x q and stands on the left or on the right."""

    left: bool
    p: int
    q: int

    @property
    def size(self) -> int:
        return self.p * self.q

    def refines(self, other: "Grid", rows: int) -> bool:
        """Whether each block of the other grid is a union of blocks of this one (with the same padding: none)."""
        fits = self.p % other.p == 0 and self.q % other.q == 0 and rows % self.p == 0
        return self == other or (self.left == other.left and fits)


def cut(weight: Tensor, grid: Grid) -> Tensor:
    """W (rows, cols) in blocks that share one entry of the small factor: (p * q, r * s), padded rows zero."""
    p, q = grid.p, grid.q
    rows, cols = weight.shape
    r, s = -(-rows // p), cols // q
    weight = weight if p * r == rows else F.pad(weight, (0, 0, 0, p * r - rows))
    if grid.left:
        return weight.view(p, r, q, s).permute(0, 2, 1, 3).reshape(p * q, r * s)
    return weight.view(r, p, s, q).permute(1, 3, 0, 2).reshape(p * q, r * s)


def uncut(blocks: Tensor, grid: Grid, rows: int, cols: int) -> Tensor:
    """The weight (rows, cols) that `cut` makes these blocks of; padded rows are dropped."""
    p, q = grid.p, grid.q
    r, s = -(-rows // p), cols // q
    grids = blocks.view(p, q, r, s)
    order = (0, 2, 1, 3) if grid.left else (2, 0, 3, 1)
    return grids.permute(order).reshape(p * r, cols)[:rows]


@functools.lru_cache(maxsize=256)
def cover(grids: tuple[Grid, ...], rows: int, cols: int, max_size: int) -> Mapping[Grid, Sequence[tuple[Grid, Grid]]]:
    """Grids whose Gram matrices are computed; for each, those of `grids` that it serves, and what each is traced from.

    A Gram matrix costs multiply-adds as many as the weight times its side, and a rearranged copy: two grids are
    merged into their common refinement as long as that is cheaper than what it replaces.
    """
    left = [g for g in grids if not any(other != g and other.refines(g, rows) for other in grids)]

    def cost(covered: Iterable[Grid]) -> int:
        return sum(g.size + COPY_COST for g in covered)

    while True:
        best: tuple[int, Grid | None] = (0, None)
        for a, b in itertools.combinations(left, 2):
            fine = Grid(a.left, math.lcm(a.p, b.p), math.lcm(a.q, b.q))
            if a.left == b.left and rows % fine.p == cols % fine.q == 0 and fine.size <= max_size:
                saved = cost(g for g in left if fine.refines(g, rows)) - cost([fine])
                best = max(best, (saved, fine), key=lambda pair: pair[0])
        if best[1] is None:
            served = {g: next(f for f in left if f.refines(g, rows)) for g in grids}
            return {fine: _sources(fine, [g for g in grids if served[g] == fine], rows) for fine in left}
        fine = best[1]
        left = [*(g for g in left if not fine.refines(g, rows)), fine]


def _sources(fine: Grid, grids: Sequence[Grid], rows: int) -> list[tuple[Grid, Grid]]:
    """Each grid with the smallest one, among `fine` and those listed before it, that refines it."""
    done, pairs = [fine], []
    for grid in sorted(grids, key=lambda g: g.size, reverse=True):
        pairs.append((grid, min((g for g in done if g.refines(grid, rows)), key=lambda g: g.size)))
        done.append(grid)
    return pairs


def coarsen(gram: Tensor, fine: Grid, coarse: Grid) -> Tensor:
    """Gram matrix of a coarser grid: a coarse block is a union of fine ones, so their inner products add up."""
    if fine == coarse:
        return gram
    p, q = coarse.p, coarse.q
    a, b = fine.p // p, fine.q // q
    if fine.left:
        return torch.einsum("iajbkalb->ijkl", gram.view(p, a, q, b, p, a, q, b)).reshape(p * q, p * q)
    return torch.einsum("aibjakbl->ijkl", gram.view(a, p, b, q, a, p, b, q)).reshape(p * q, p * q)
