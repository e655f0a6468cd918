"""Monarch: two block-diagonal factors around a permutation; block (i, j) of W has a rank of its own.

Source: Dao et al., "Monarch: Expressive structured matrices for efficient and accurate training" (ICML 2022), whose
projection of a dense matrix is the SVD of each block, in closed form. Ours: any numbers of blocks, rectangular ones
and ranks above 1; blocks are contiguous, where the paper interleaves rows. Measured on the weights of all-MiniLM-L6-v2
at 4 times fewer parameters: interleaving changes the kept energy by -.03 to +.02, few blocks keep the most (2 x 2 .44
to .53, 4 x 4 .42 to .49, 8 x 8 .41 to .47), and cutting the long side alone is level with the SVD.

Weighted by what a layer sees, each block is fitted in its own metric, and what this costs all together, the products of
different blocks' errors included, prices every rank exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core.chain import Chain, LastAxis, Step
from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.decomposition import Analysis, Decomposition
from compresskit.core.folding import gram
from compresskit.core.grid import Pair, check_grid, grid_sizes
from compresskit.core.importance import Importance
from compresskit.core.metric import Metric, Moment
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec, linear, tensor_of
from compresskit.errors import OptionError, StructureError

GRIDS = ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 4))
"""Numbers of blocks along rows and columns that the menu offers; those that keep the most."""
RANK_STEP = 1.05


@final
@dataclass(frozen=True)
class MonarchBlocks(Structure):
    """W (rows, cols) in p x q blocks, block (i, j) = left_ij (rows / p, rank) @ right_ij (rank, cols / q).

    Stored as right (q, p * rank, cols / q) and left (p, rows / p, q * rank): two batched products with the permutation
    between them. What is not cut (q = 1, p = 1) is one plain product.
    """

    kind: ClassVar[str] = "monarch"

    blocks: Pair
    rank: int

    def validate(self) -> None:
        check_grid("a Monarch matrix", self.rows, self.cols, self.blocks, self.rank)
        _, _, m, n = self._sizes
        if self.rank > min(m, n):
            raise StructureError(f"the rank of a block of {m} x {n} is 1 to {min(m, n)}, got {self.rank}")

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """p, q, rows and cols of a block."""
        return grid_sizes(self.rows, self.cols, self.blocks)

    def factor_specs(self) -> dict[str, TensorSpec]:
        p, q, m, n = self._sizes
        right, left = (q, p * self.rank, n), (p, m, q * self.rank)
        return {
            "right": TensorSpec(right[1:], matrix=True) if q == 1 else TensorSpec(right),
            "left": TensorSpec(left[1:], matrix=True) if p == 1 else TensorSpec(left),
        }

    def pack(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Stored layout of left (p, q, m, rank) and right (p, q, rank, n)."""
        specs = self.factor_specs()
        return {
            "right": right.transpose(0, 1).reshape(specs["right"].shape),
            "left": left.transpose(1, 2).reshape(specs["left"].shape),
        }

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        p, q, m, n = self._sizes
        left = factors["left"].view(p, m, q, self.rank).transpose(1, 2)
        right = factors["right"].view(q, p, self.rank, n).transpose(0, 1)
        return torch.matmul(left, right).transpose(1, 2).reshape(self.rows, self.cols)

    @cached_property
    def _chain(self) -> Chain:
        (p, q, m, n), rank = self._sizes, self.rank
        right = LastAxis("right", 1, n, p * rank) if q == 1 else _Right("right", p, q, rank, n)
        left = LastAxis("left", 1, q * rank, m) if p == 1 and q == 1 else _Left("left", p, q, rank, m)
        return Chain(self.cols, (right, left))

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return self._chain.run(x, factors, bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """p * rank * cols multiply-adds per row: those of the other blocks of rows are multiplied by zero."""
        p, q, m, n = self._sizes
        row = F.embedding(index, factors["left"].view(self.rows, -1)).unflatten(-1, (q, 1, self.rank))
        own = torch.arange(p, device=index.device) == (index // m)[..., None]  # (..., p)
        spread = (row * own[..., None, :, None]).reshape(-1, q, p * self.rank)
        rows = torch.bmm(spread.transpose(0, 1), factors["right"].view(q, -1, n))  # (q, tokens, n)
        return rows.transpose(0, 1).reshape(*index.shape, self.cols)

    @property
    def macs(self) -> int:
        return self.num_params

    @property
    def lookup_macs(self) -> int:
        return self.blocks[0] * self.rank * self.cols

    def operations(self, tokens: int) -> Sequence[Operation]:
        p, q, m, n = self._sizes
        middle = [Pass(2 * tokens * p * q * self.rank)] if q > 1 else []
        last = [Pass(2 * tokens * self.rows)] if p > 1 else []
        products = Gemm(tokens, p * self.rank, n, batch=q), Gemm(tokens, m, q * self.rank, batch=p)
        return (products[0], *middle, products[1], *last)


@final
@dataclass(frozen=True)
class _Right(Step):
    """x (..., q * n) -> (q, tokens, p * rank): block j of columns times its own factor, right (q, p * rank, n)."""

    p: int
    q: int
    rank: int
    n: int

    @property
    def numbers(self) -> int:
        return self.q * self.p * self.rank

    @property
    def macs(self) -> int:
        return self.numbers * self.n

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        return torch.bmm(self._blocks(x), tensor_of(factor).mT)

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        return torch.bmm(grad, factor).transpose(0, 1).reshape(-1, self.q * self.n)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(grad.mT, self._blocks(x))

    def _blocks(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.q, self.n).transpose(0, 1)


@final
@dataclass(frozen=True)
class _Left(Step):
    """(q, tokens, p * rank), or (..., p * rank) if q is 1 -> (tokens, p * m).

    The factor, left, is (p, m, q * rank), or (m, q * rank) if p is 1.
    """

    p: int
    q: int
    rank: int
    m: int

    @property
    def numbers(self) -> int:
        return self.p * self.m

    @property
    def macs(self) -> int:
        return self.numbers * self.q * self.rank

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        if self.p == 1:
            return linear(self._blocks(x)[0], factor, bias)
        blocks, left = self._blocks(x), tensor_of(factor).mT
        y = torch.bmm(blocks, left) if bias is None else torch.baddbmm(bias.view(self.p, 1, self.m), blocks, left)
        return y.transpose(0, 1).reshape(-1, self.p * self.m)

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        blocks = torch.bmm(self._rows(grad), factor.view(self.p, self.m, -1))  # (p, tokens, q * rank)
        grid = blocks.reshape(self.p, -1, self.q, self.rank).permute(2, 1, 0, 3)  # (q, tokens, p, rank)
        flat = grid.reshape(self.q, -1, self.p * self.rank)
        return flat[0] if self.q == 1 else flat

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        found = torch.bmm(self._rows(grad).mT, self._blocks(x))
        return found[0] if self.p == 1 else found

    def _rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, self.p, self.m).transpose(0, 1)

    def _blocks(self, x: Tensor) -> Tensor:
        """(p, tokens, q * rank)."""
        grid = x.reshape(self.q, -1, self.p, self.rank).permute(2, 1, 0, 3)  # (p, tokens, q, rank)
        return grid.reshape(self.p, -1, self.q * self.rank)


@register
@final
@dataclass(frozen=True)
class Monarch(Decomposition):
    """Truncated SVD of each block, the square roots of the singular values split between both factors.

    Args:
        blocks: numbers of blocks (p, q) along rows and columns; None: the budget chooses among few.
        rank: this rank of every block; None: the budget chooses.
    """

    name: ClassVar[str] = "monarch"
    summary: ClassVar[str] = "block (i, j) of W ~ left_ij @ right_ij: two block-diagonal factors and a permutation"
    source: ClassVar[str] = "Dao et al., ICML 2022; rectangular, any rank"
    structures: ClassVar[tuple[type[Structure], ...]] = (MonarchBlocks,)
    prices_at_once: ClassVar[bool] = True

    blocks: tuple[int, int] | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and min(self.blocks) < 1:
            raise OptionError(f"blocks are counts along rows and columns, at least 1; got {self.blocks}")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank is a count, at least 1; got {self.rank}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        for p, q in [self.blocks] if self.blocks else GRIDS:
            if rows % p or cols % q:
                continue
            top = min(rows // p, cols // q, (rows * cols - 1) // (p * cols + q * rows))
            for rank in [self.rank] if self.rank else _ranks(top):
                if rank <= top:
                    yield MonarchBlocks(rows, cols, (p, q), rank)

    def analyse(self, weight: Tensor) -> Analysis:
        return _MonarchAnalysis(weight, None)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        return _MonarchAnalysis(weight, importance.metric(weight))


def _ranks(top: int) -> Iterable[int]:
    rank = 1
    while rank <= top:
        yield rank
        rank = max(rank + 1, int(rank * RANK_STEP))


@final
class _MonarchAnalysis(Analysis):
    """Triples of each block's SVD in its metric; suffix sums of their inner products price all ranks.

    In float64 for fits; in the weight's own dtype for prices, which are exact for whatever triples.
    """

    def __init__(self, weight: Tensor, metric: Metric | None) -> None:
        self._weight = weight
        self._metric = metric
        self._cast: dict[torch.dtype, tuple[Moment, Moment]] = {}
        self._small: dict[int, _MonarchAnalysis] = {}  # by p, what stands for a tall weight
        self._errors: dict[Pair, list[float]] = {}  # of rank 0, 1, ...

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        found = []
        for structure in structures:
            assert isinstance(structure, MonarchBlocks)
            if structure.blocks not in self._errors:
                self._errors[structure.blocks] = self._all_errors(structure.blocks)
            found.append(self._errors[structure.blocks][structure.rank])
        self._cast.clear()
        self._small.clear()
        return found

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        assert isinstance(structure, MonarchBlocks)
        left, right = self._triples(structure.blocks)
        left, right = left[..., : structure.rank], right[..., : structure.rank, :]
        scale = (torch.linalg.vector_norm(right, dim=-1) / torch.linalg.vector_norm(left, dim=-2)).sqrt()
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # split evenly: both train at one scale
        left, right = left * scale[..., None, :], right / scale[..., None]
        return structure.pack(left.to(self._weight.dtype), right.to(self._weight.dtype))

    def _cut(self, blocks: Pair, dtype: torch.dtype = torch.float64) -> Tensor:
        """(p, q, m, n)."""
        (p, q), (rows, cols) = blocks, self._weight.shape
        return self._weight.reshape(p, rows // p, q, cols // q).transpose(1, 2).to(dtype)

    def _moments(self, dtype: torch.dtype) -> tuple[Moment, Moment]:
        """R and C."""
        if self._metric is None:
            return Moment(None), Moment(None)
        if dtype not in self._cast:
            like = self._weight.new_empty(0, dtype=dtype)
            rows, cols = (Moment.of(moment.values, like=like) for moment in (self._metric.rows, self._metric.cols))
            self._cast[dtype] = rows, cols
        return self._cast[dtype]

    def _all_errors(self, blocks: Pair) -> list[float]:
        if self._metric is None:
            grid = self._cut(blocks)
            grams = grid @ grid.mT if grid.shape[-2] <= grid.shape[-1] else grid.mT @ grid
            tails = torch.linalg.eigvalsh(grams).clamp_min(0).cumsum(-1).sum((0, 1))
            return [*tails.flip(0).tolist(), 0.0]
        rows, cols = self._weight.shape
        if rows > blocks[0] * cols and (self._metric.rows.values is None or self._metric.rows.values.dim() == 1):
            return self._tall_errors(blocks)
        left, right = self._triples(blocks, self._weight.dtype)
        r, c = self._moments(self._weight.dtype)
        products = _coupled(left, right, r, c).double()  # (k, k); those of small components are small themselves
        tails = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().clamp_min(0) * self._metric.scale
        return [*tails.flip(0).tolist(), 0.0]

    def _tall_errors(self, blocks: Pair) -> list[float]:
        """The same where independent rows outnumber the columns: all that matters of a block W is W^T R W."""
        assert self._metric is not None
        p = blocks[0]
        if p not in self._small:
            scaled = Moment.of(self._metric.rows.root().values, like=self._weight).before(self._weight)
            roots = torch.cat([Moment(gram(part)).factor().T for part in scaled.chunk(p)])
            self._small[p] = _MonarchAnalysis(roots.to(self._weight.dtype), self._metric.without_rows())
        return self._small[p]._all_errors(blocks)

    def _triples(self, blocks: Pair, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """left (p, q, m, k) and right (p, q, k, n), leading first: their product of all k is the weight."""
        grid = self._cut(blocks, dtype)
        (p, q, m, n), (r, c) = grid.shape, self._moments(dtype)
        rows, cols = [_own(r, i, m) for i in range(p)], [_own(c, j, n) for j in range(q)]
        pairs = [[_leading(grid[i, j], rows[i], cols[j]) for j in range(q)] for i in range(p)]
        left, right = (torch.stack([torch.stack([pair[side] for pair in row]) for row in pairs]) for side in (0, 1))
        return left, right


def _own(moment: Moment, index: int, size: int) -> Moment:
    """What a moment says of one block alone."""
    if moment.values is None:
        return moment
    part = slice(index * size, (index + 1) * size)
    return Moment(moment.values[part] if moment.values.dim() == 1 else moment.values[part, part])


def _leading(block: Tensor, rows: Moment, cols: Moment) -> tuple[Tensor, Tensor]:
    """left (m, k), right (k, n): their first r are the nearest of rank r in the metric, all of them are the block."""
    scaled = rows.root().before(block)
    if block.shape[0] <= block.shape[1]:
        basis = torch.linalg.eigh(cols.after(scaled) @ scaled.T).eigenvectors.flip(-1)
    else:
        whitened = cols.whitened(scaled)
        basis = torch.linalg.qr(whitened @ torch.linalg.eigh(whitened.T @ whitened).eigenvectors.flip(-1)).Q
    return rows.inverse_root().before(basis), basis.T @ scaled


def _coupled(left: Tensor, right: Tensor, rows: Moment, cols: Moment) -> Tensor:
    """(k, k): sum over all pairs of blocks of (l_a^T R l_b)(r_a C r_b^T) for components a and b of them.

    Blocks that R or C do not couple have nothing in common.
    """
    p, q, m, k = left.shape
    n = right.shape[-1]
    total = left.new_zeros(k, k)
    for i, h in _coupling(rows, p):
        for j, l in _coupling(cols, q):
            if j <= l:
                lefts = left[i, j].T @ _block(rows, i, h, m, left[h, l])
                products = lefts * (right[i, j] @ _block(cols, j, l, n, right[h, l].T))
                total += products if j == l else products + products.T  # and those of (h, l) with (i, j)
    return total


def _coupling(moment: Moment, count: int) -> list[Pair]:
    full = moment.values is not None and moment.values.dim() == 2
    return [(i, h) for i in range(count) for h in range(count) if full or i == h]


def _block(moment: Moment, i: int, h: int, size: int, matrix: Tensor) -> Tensor:
    """Block (i, h) of a moment @ matrix."""
    values = moment.values
    if values is None:
        return matrix
    own = slice(i * size, (i + 1) * size)
    return values[own, None] * matrix if values.dim() == 1 else values[own, h * size : (h + 1) * size] @ matrix
