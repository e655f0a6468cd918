"""BLAST: block (i, j) of W is U_i diag(s_ij) V_j^T: bases that rows and columns of blocks share, diagonal couplings.

Source: Lee et al., "BLAST: Block-level adaptive structured matrices for efficient deep neural network inference"
(NeurIPS 2024). It contains low rank (all s_ij = 1), block-diagonal and block low-rank matrices, for p * q * rank
numbers more than low rank. The paper factorises by preconditioned gradient descent from small random factors. Ours
starts at the SVD of the same rank, plain or weighted, and alternates exact solutions, so it is never worse than that
SVD (`core.blockfit`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core.blockfit import BlockFit, Blocks
from compresskit.core.chain import Chain, Step
from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.decomposition import Analysis, Decomposition, squared_norm
from compresskit.core.gains import Gains
from compresskit.core.grid import Pair, check_grid, grid_sizes
from compresskit.core.importance import Importance
from compresskit.core.metric import Metric, Moment
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec, tensor_of
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import OptionError, StructureError

MAX_BLOCKS = 8
"""Blocks along a side that the menu offers at most. More fit better, but their coupling costs time."""
RANK_STEP = 1.02
"""Neighbouring ranks of the menu."""
ROUNDING = 1e-5
"""Share by which an error may be above its price without being worse."""
APART = 1.5
"""A weighted fit is not tried from the plain fit's start as well if that loses so many times as much, squared."""


@final
@dataclass(frozen=True)
class BlastBlocks(Structure):
    """W (rows, cols) in p x q blocks, block (i, j) = left_i @ diag(scales[:, i, j]) @ right_j.

    Stored as left (p, rows / p, rank), scales (rank, p, q), right (q, rank, cols / q): each product of `matmul` then
    reads the result of the one before without a copy.
    """

    kind: ClassVar[str] = "blast"

    blocks: Pair
    rank: int

    def validate(self) -> None:
        check_grid("a BLAST matrix", self.rows, self.cols, self.blocks, self.rank)
        if self.rank > min(self.rows, self.cols):
            raise StructureError(f"the rank of a {self.rows} x {self.cols} weight is 1 to {min(self.rows, self.cols)}")

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """p, q, rows and cols of a block."""
        return grid_sizes(self.rows, self.cols, self.blocks)

    def factor_specs(self) -> dict[str, TensorSpec]:
        p, q, m, n = self._sizes
        return {
            "left": TensorSpec((p, m, self.rank)),
            "scales": TensorSpec((self.rank, p, q)),
            "right": TensorSpec((q, self.rank, n)),
        }

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return Blocks(factors["left"], factors["scales"].permute(1, 2, 0), factors["right"].mT).dense()

    @cached_property
    def _chain(self) -> Chain:
        (p, q, m, n), rank = self._sizes, self.rank
        return Chain(self.cols, (_Right("right", q, rank, n), _Couple("scales", p, q, rank), _Left("left", p, rank, m)))

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return self._chain.run(x, factors, bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """rank * cols multiply-adds per row, as with SVD, and q * rank for the coupling."""
        _, q, m, _ = self._sizes
        row = F.embedding(index, factors["left"].flatten(0, 1))  # (..., rank)
        scales = F.embedding(index // m, factors["scales"].permute(1, 2, 0).flatten(1)).unflatten(-1, (q, self.rank))
        coordinates = (scales * row[..., None, :]).reshape(-1, q, self.rank)
        rows = torch.bmm(coordinates.transpose(0, 1), factors["right"])  # (q, tokens, n)
        return rows.transpose(0, 1).reshape(*index.shape, self.cols)

    @property
    def macs(self) -> int:
        p, q, _, _ = self._sizes
        return self.rank * (self.rows + self.cols + p * q)

    @property
    def lookup_macs(self) -> int:
        return self.rank * (self.blocks[1] + self.cols)

    def operations(self, tokens: int) -> Sequence[Operation]:
        p, q, m, n = self._sizes
        return (
            Gemm(self.rank, tokens, n, batch=q),
            Gemm(p, tokens, q, batch=self.rank),
            Gemm(tokens, m, self.rank, batch=p),
            Pass(2 * tokens * self.rows),
        )

    def lookup_operations(self, tokens: int) -> Sequence[Operation]:
        _, q, _, n = self._sizes
        return (
            Pass(tokens * self.rank * (2 + 4 * q)),
            Gemm(tokens, n, self.rank, batch=q),
            Pass(2 * tokens * self.cols),
        )


@final
@dataclass(frozen=True)
class _Right(Step):
    """x (..., q * n) -> (q, rank, tokens): right (q, rank, n)."""

    q: int
    rank: int
    n: int

    @property
    def numbers(self) -> int:
        return self.q * self.rank

    @property
    def macs(self) -> int:
        return self.numbers * self.n

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        return torch.bmm(tensor_of(factor), self._blocks(x).mT)

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        return torch.bmm(grad.mT, factor).transpose(0, 1).reshape(-1, self.q * self.n)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(grad, self._blocks(x))

    def _blocks(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.q, self.n).transpose(0, 1)  # (q, tokens, n)


@final
@dataclass(frozen=True)
class _Couple(Step):
    """(q, rank, tokens) -> (rank, p, tokens): scales (rank, p, q)."""

    p: int
    q: int
    rank: int

    @property
    def numbers(self) -> int:
        return self.p * self.rank

    @property
    def macs(self) -> int:
        return self.numbers * self.q

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        return torch.bmm(tensor_of(factor), x.transpose(0, 1))

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        return torch.bmm(factor.mT, grad).transpose(0, 1)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(grad, x.permute(1, 2, 0))


@final
@dataclass(frozen=True)
class _Left(Step):
    """(rank, p, tokens) -> (tokens, p * m): left (p, m, rank)."""

    p: int
    rank: int
    m: int

    @property
    def numbers(self) -> int:
        return self.p * self.m

    @property
    def macs(self) -> int:
        return self.numbers * self.rank

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        x, left = x.permute(1, 2, 0), tensor_of(factor).mT
        y = torch.bmm(x, left) if bias is None else torch.baddbmm(bias.view(self.p, 1, self.m), x, left)
        return y.transpose(0, 1).reshape(-1, self.p * self.m)

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        return torch.bmm(factor.mT, self._rows(grad).mT).transpose(0, 1)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(self._rows(grad).mT, x.permute(1, 2, 0))

    def _rows(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, self.p, self.m).transpose(0, 1)  # (p, tokens, m)


@register
@final
@dataclass(frozen=True)
class Blast(Decomposition):
    """Alternating least squares from the SVD of the same rank.

    Args:
        blocks: numbers of blocks (p, q) along rows and columns; None: the largest up to 8 that divide them.
        rank: this rank everywhere; None: the budget chooses.
        rounds: rounds of alternating least squares; 0: the SVD as it is. A fit goes on, up to four times as long, until
            it is as good as its price.
    """

    name: ClassVar[str] = "blast"
    summary: ClassVar[str] = "block (i, j) of W ~ U_i diag(s_ij) V_j^T"
    source: ClassVar[str] = "Lee et al., NeurIPS 2024; started at the SVD, alternating least squares"
    structures: ClassVar[tuple[type[Structure], ...]] = (BlastBlocks,)
    prices_at_once: ClassVar[bool] = True
    prices_dearly: ClassVar[bool] = True

    blocks: tuple[int, int] | None = None
    rank: int | None = None
    rounds: int = 15

    def __post_init__(self) -> None:
        if self.blocks is not None and min(self.blocks) < 1:
            raise OptionError(f"blocks are counts along rows and columns, at least 1; got {self.blocks}")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank is a count, at least 1; got {self.rank}")
        if self.rounds < 0:
            raise OptionError(f"rounds is a number of rounds, at least 0; got {self.rounds}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        p, q = self.blocks or (_blocks(rows), _blocks(cols))
        if rows % p or cols % q or (self.blocks is None and p * q == 1):
            return
        top = _top(rows, cols, (p, q))
        ranks = [self.rank] if self.rank else _ranks(top)
        yield from (BlastBlocks(rows, cols, (p, q), rank) for rank in ranks if rank <= top)

    def recovers(self, structure: Structure) -> bool:
        """Only what is low rank; else the factors are a local minimum."""
        return isinstance(structure, BlastBlocks) and (structure.rank == 1 or min(structure.blocks) == 1)

    def analyse(self, weight: Tensor) -> Analysis:
        return _BlastAnalysis(weight, None, self.rounds)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        return _BlastAnalysis(weight, importance, self.rounds)


def _blocks(n: int) -> int:
    """The largest number of blocks up to MAX_BLOCKS that divides a side and leaves blocks at least as long."""
    return max(b for b in range(1, MAX_BLOCKS + 1) if n % b == 0 and (b == 1 or n >= 2 * b))


def _top(rows: int, cols: int, blocks: Pair) -> int:
    """The highest rank with fewer numbers than the weight; 0: there is none."""
    return min(rows, cols, (rows * cols - 1) // (rows + cols + blocks[0] * blocks[1]))


def _ranks(top: int) -> list[int]:
    """From `top` downwards, neighbours a factor RANK_STEP apart."""
    ranks, rank = [], top
    while rank >= 1:
        ranks.append(rank)
        rank = min(rank - 1, int(rank / RANK_STEP))
    return ranks[::-1]


@final
class _BlastAnalysis(Analysis):
    """The SVD of a rank, refined; what that gains at all ranks follows from short fits at a few (core/gains.py)."""

    def __init__(self, weight: Tensor, importance: Importance | None, rounds: int) -> None:
        self._given = weight
        self._scale = float(torch.linalg.vector_norm(weight)) / weight.numel() ** 0.5 or 1.0
        self._importance = importance
        self._rounds = rounds
        self._measured: dict[BlastBlocks, float] = {}
        self._promised: dict[BlastBlocks, float] = {}
        self._lows: list[float] = []
        self._problems: dict[Pair, BlockFit] = {}

    @cached_property
    def _weight(self) -> Tensor:
        return (self._given / self._scale).contiguous()  # products of three factors stay in range

    @cached_property
    def _metric(self) -> Metric | None:
        return None if self._importance is None else self._importance.metric(self._given)

    @cached_property
    def _start(self) -> Analysis:
        return SVD().analyse_for(self._weight, self._importance)

    def shrink(self) -> None:
        self._problems.clear()
        for name in ("_weight", "_metric", "_start"):
            vars(self).pop(name, None)

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        blasts = [structure for structure in structures if isinstance(structure, BlastBlocks)]
        self._promised.update((s, self._low(s) * self._left(s)) for s in blasts)
        return [self._promised[structure] * self._scale**2 for structure in blasts]

    def _low(self, structure: BlastBlocks) -> float:
        """Squared error of the SVD of the same rank; those of all ranks are asked for at once, and kept."""
        if structure.rank > len(self._lows):
            rows, cols, rank = structure.rows, structure.cols, structure.rank
            top = max(rank, _top(rows, cols, structure.blocks))
            self._lows = self._start.squared_errors([LowRank(rows, cols, i + 1) for i in range(top)])
        return self._lows[structure.rank - 1]

    def _left(self, structure: BlastBlocks) -> float:
        """Squared error / that of the SVD of this rank, as expected."""
        rows, cols, blocks = structure.rows, structure.cols, structure.blocks

        def at(rank: int, rounds: int) -> float:
            return self._left_after(BlastBlocks(rows, cols, blocks, rank), rounds)

        short = self._metric is not None and not self._metric.cols.is_identity
        return Gains(_top(rows, cols, blocks), self._rounds, short, at).share(structure.rank)

    def _left_after(self, structure: BlastBlocks, rounds: int) -> float:
        """The same after so many rounds, from a fit of this very rank."""
        if structure not in self._measured:
            low = self._low(structure)
            error = self._problem(structure.blocks).error(self._first(structure), rounds)
            self._measured[structure] = min(error * self._unit / low, 1.0) if low > 0 else 1.0
        return self._measured[structure]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        assert isinstance(structure, BlastBlocks)
        first, until = self._first(structure), self._promise(structure) * (1 + ROUNDING) / (self._unit or 1.0)
        blocks = self._problem(structure.blocks).refine(first, self._rounds, until=until)
        if self._importance is not None:  # both end in optima of their own: the plain fit can be the better one
            plain = _BlastAnalysis(self._weight, None, self._rounds)
            if self._error(plain._first(structure).times(plain._scale)) <= APART * self._error(first):
                other = plain._problem(structure.blocks).refine(plain._first(structure), self._rounds)
                blocks = min(blocks, other.times(plain._scale), key=self._error)
        return _stored(blocks, self._scale)

    def _promise(self, structure: BlastBlocks) -> float:
        """Its price, for the scaled weight, whether it has been asked for or not: fits do not depend on that."""
        if structure not in self._promised:
            self.squared_errors([structure])
        return self._promised[structure]

    @property
    def _unit(self) -> float:
        """Squared errors of this analysis / those of its problems."""
        return 1.0 if self._metric is None else self._metric.scale

    def _error(self, blocks: Blocks) -> float:
        """Squared error of the scaled weight, weighted if there is an importance."""
        difference = self._weight - blocks.dense()
        return squared_norm(difference) if self._importance is None else self._importance.squared_norm(difference)

    def _problem(self, blocks: Pair) -> BlockFit:
        if blocks not in self._problems:
            metric = self._metric
            rows, cols = (Moment(None), Moment(None)) if metric is None else (metric.rows, metric.cols)
            self._problems[blocks] = BlockFit(self._weight, blocks, rows, cols)
        return self._problems[blocks]

    def _first(self, structure: BlastBlocks) -> Blocks:
        """The SVD of the same rank."""
        p, q = structure.blocks
        low = self._start.factors(LowRank(structure.rows, structure.cols, structure.rank))
        left, right = low["left"].unflatten(0, (p, -1)), low["right"].T.unflatten(0, (q, -1))
        return Blocks(left.contiguous(), left.new_ones(p, q, structure.rank), right.contiguous())


def _stored(blocks: Blocks, scale: float) -> dict[str, Tensor]:
    """Factors as they are stored, each component's size spread evenly over the three: all train at one scale."""
    sizes = [torch.linalg.vector_norm(t, dim=(0, 1)) / t[..., 0].numel() ** 0.5 for t in vars(blocks).values()]
    each = (sizes[0] * sizes[1] * sizes[2] * scale).pow(1 / 3)
    left, scales, right = (
        torch.where(size > 0, tensor * (each / size), 0.0)
        for size, tensor in zip(sizes, vars(blocks).values(), strict=True)
    )
    return {"left": left, "scales": scales.permute(2, 0, 1), "right": right.mT}
