"""Tensor train: the weight folded to (r1, r2, c1, c2) as a chain of four cores; an end of full rank has no core.

Source: Oseledets, SIAM J. Sci. Comput. 33 (2011): TT-SVD, and its error bound by the spectra of the unfoldings;
computed by tensorly on the weight's coordinates in its leading singular vectors. The middle rank cuts W into
left @ right as truncated SVD does, the outer ranks cut these two further.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from compresskit.core.chain import Chain, FirstAxis, LastAxis
from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.decomposition import Analysis, Decomposition
from compresskit.core.folding import Unfolding, balanced_factors, rank_triples
from compresskit.core.native import Native
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec
from compresskit.errors import OptionError, StructureError

WIDTH = 4
"""TT-SVD works in the leading `WIDTH * middle rank` singular vectors of the weight where the first mode is cut."""

Pair = tuple[int, int]


@final
@dataclass(frozen=True)
class TrainCores(Structure):
    """W (rows, cols) = (first (x) 1) @ left @ right @ (1 (x) last): cores of the modes r1, r2, c1, c2 in this order.

    `row_modes` (r1, r2) and `col_modes` (c1, c2) fold the sides; `ranks` (s1, s2, s3) link the cores first (r1, s1),
    left (s1 * r2, s2), right (s2, c1 * s3) and last (s3, c2). An outer rank that equals its mode's size leaves that
    core out. All products but the one with `first` are plain `x @ factor.T`, and nothing is ever transposed.
    """

    kind: ClassVar[str] = "tensor-train"

    row_modes: Pair
    col_modes: Pair
    ranks: tuple[int, int, int]

    def validate(self) -> None:
        if (len(self.row_modes), len(self.col_modes), len(self.ranks)) != (2, 2, 3):
            raise StructureError(f"a tensor train has two modes on each side and three ranks, got {self}")
        if math.prod(self.row_modes) != self.rows or math.prod(self.col_modes) != self.cols:
            raise StructureError(f"modes {self.row_modes} and {self.col_modes} do not make {self.rows} x {self.cols}")
        if not _possible(self.row_modes, self.col_modes, self.ranks):
            raise StructureError(
                f"ranks {self.ranks} of modes {self.row_modes} and {self.col_modes}: each is 1 to the product of what "
                "stands on either side of it"
            )

    def factor_specs(self) -> dict[str, TensorSpec]:
        (r1, r2), (c1, c2), (s1, s2, s3) = self.row_modes, self.col_modes, self.ranks
        specs = {"left": TensorSpec((s1 * r2, s2), matrix=True), "right": TensorSpec((s2, c1 * s3), matrix=True)}
        if s1 < r1:
            specs = {"first": TensorSpec((r1, s1)), **specs}
        if s3 < c2:
            specs["last"] = TensorSpec((s3, c2), matrix=True)
        return specs

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        left = factors["left"]
        if "first" in factors:
            left = factors["first"] @ left.view(self.ranks[0], -1)  # (r1, r2 * s2)
        return self._expand_cols(left.reshape(self.rows, -1), factors)

    @cached_property
    def _chain(self) -> Chain:
        (r1, r2), (c1, c2), (s1, s2, s3) = self.row_modes, self.col_modes, self.ranks
        last = (LastAxis("last", c1, c2, s3),) if s3 < c2 else ()
        first = (FirstAxis("first", s1, r1, r2),) if s1 < r1 else ()
        middle = LastAxis("right", 1, c1 * s3, s2), LastAxis("left", 1, s2, s1 * r2)
        return Chain(self.cols, (*last, *middle, *first))

    @property
    def native(self) -> Native | None:
        return self._chain.native

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return self._chain.run(x, factors, bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        left, s1, r2 = factors["left"], self.ranks[0], self.row_modes[1]
        if "first" not in factors:
            return self._expand_cols(torch.embedding(left, index), factors)
        steps = torch.arange(s1, device=index.device) * r2
        rows = torch.embedding(left, (index % r2)[..., None] + steps)  # (..., s1, s2)
        mixed = torch.matmul(torch.embedding(factors["first"], index // r2)[..., None, :], rows)
        return self._expand_cols(mixed.squeeze(-2), factors)

    def _expand_cols(self, z: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Z @ right @ (1 (x) last): (..., s2) -> (..., cols)."""
        y = z @ factors["right"]
        if "last" not in factors:
            return y
        grid: Tensor = y.view(*y.shape[:-1], self.col_modes[0], self.ranks[2])
        return torch.matmul(grid, factors["last"]).flatten(-2)

    @property
    def _col_macs(self) -> int:
        (c1, c2), (_, s2, s3) = self.col_modes, self.ranks
        return c1 * s3 * (s2 + c2 * (s3 < c2))

    @property
    def macs(self) -> int:
        (r1, r2), (s1, s2, _) = self.row_modes, self.ranks
        return self._col_macs + s1 * r2 * (s2 + r1 * (s1 < r1))

    def operations(self, tokens: int) -> Sequence[Operation]:
        (r1, r2), (c1, c2), (s1, s2, s3) = self.row_modes, self.col_modes, self.ranks
        last = [Gemm(tokens * c1, s3, c2)] if s3 < c2 else []
        first: list[Operation] = [Gemm(r1, r2, s1, batch=tokens), Pass(2 * tokens * self.rows)] if s1 < r1 else []
        return (*last, Gemm(tokens, s2, c1 * s3), Gemm(tokens, s1 * r2, s2), *first)

    @property
    def lookup_macs(self) -> int:
        s1, s2, _ = self.ranks
        return self._col_macs + (s1 * s2 if s1 < self.row_modes[0] else 0)


def _possible(row_modes: Pair, col_modes: Pair, ranks: tuple[int, int, int]) -> bool:
    (r1, r2), (c1, c2), (s1, s2, s3) = row_modes, col_modes, ranks
    outer = 1 <= s1 <= min(r1, r2 * s2 if s1 < r1 else r1) and 1 <= s3 <= min(c2, c1 * s2 if s3 < c2 else c2)
    return outer and 1 <= s2 <= min(s1 * r2, c1 * s3)


@register
@final
@dataclass(frozen=True)
class TensorTrain(Decomposition):
    """Tensor-train decomposition of the weight, each side folded to the two factors of its size nearest to each other.

    Rows that are looked up one at a time (embeddings) are not folded.

    Args:
        ranks: fixed ranks (first, middle, last); None: the budget chooses.
    """

    name: ClassVar[str] = "tensor-train"
    summary: ClassVar[str] = "W folded to a 4-way tensor ~ a chain of cores, cut in the middle like an SVD"
    source: ClassVar[str] = "Oseledets 2011; tensorly"
    structures: ClassVar[tuple[type[Structure], ...]] = (TrainCores,)

    ranks: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and min(self.ranks) < 1:
            raise OptionError(f"the ranks of a tensor train are at least 1; got {self.ranks}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        row_modes = (1, rows) if lookup else balanced_factors(rows)
        col_modes = balanced_factors(cols)
        if col_modes[0] == 1:
            col_modes = (cols, 1)  # not folded: nothing for the last core to cut
        (r1, r2), (c1, c2) = row_modes, col_modes
        grid = ((s1, s2, s3) for s1, s3, s2 in rank_triples(r1, c2, lambda s1, s3: min(s1 * r2, c1 * s3)))
        for ranks in [self.ranks] if self.ranks else grid:
            if _possible(row_modes, col_modes, ranks):
                structure = TrainCores(rows, cols, row_modes, col_modes, ranks)
                if structure.num_params < rows * cols >= structure.macs:
                    yield structure

    def analyse(self, weight: Tensor) -> Analysis:
        return _TensorTrainAnalysis(weight)


@final
class _TensorTrainAnalysis(Analysis):
    """Spectra of the three unfoldings; the middle one's singular vectors are kept, and TT-SVD works in them."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._middle = Unfolding(weight.T)
        self._tails: dict[tuple[int, int], list[float]] = {}

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        """The bound of TT-SVD: what each of the three cuts would drop alone, added up."""
        trains = [_checked(structure) for structure in structures]
        self._middle.keep(WIDTH * max((s.ranks[1] for s in trains), default=1))
        return [self._bound(s) for s in trains]

    def _bound(self, s: TrainCores) -> float:
        (r1, r2), (c1, c2), (s1, s2, s3) = s.row_modes, s.col_modes, s.ranks
        return self._tail((s.rows, s.cols), s2) + self._tail((r1, r2 * s.cols), s1) + self._tail((s.rows * c1, c2), s3)

    def _tail(self, shape: tuple[int, int], rank: int) -> float:
        """Squared error of cutting the weight, reshaped to a matrix of this shape, to this rank."""
        if rank >= min(shape):
            return 0.0
        if shape not in self._tails:
            whole = shape == tuple(self._weight.shape)
            unfolding = self._middle if whole else Unfolding(self._weight.reshape(shape))
            self._tails[shape] = unfolding.energies.flip(0).cumsum(0).flip(0).tolist()
        return self._tails[shape][rank]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        s = _checked(structure)
        (c1, c2), (s1, s2, s3) = s.col_modes, s.ranks
        first, left = self._row_cores(s)
        basis = left if first is None else (first @ left.reshape(s1, -1)).reshape(s.rows, s2)
        right = basis.T @ self._weight  # (s2, cols): the best for this left side
        norms = torch.linalg.vector_norm(right, dim=1).sqrt()  # split evenly, so that both train at one scale
        factors = {"left": left * norms}
        if s3 < c2:
            sides, last = _train(right.reshape(s2 * c1, c2), (s3,))
            scale = torch.linalg.vector_norm(last, dim=1)
            right = (sides * scale).reshape(s2, c1 * s3)
            factors["last"] = torch.where(scale > 0, last.T / scale, 0.0).T
        factors["right"] = torch.where(norms > 0, right.T / norms, 0.0).T
        if first is not None:
            factors["first"] = first
        return {name: factors[name] for name in s.factor_specs()}

    def _row_cores(self, s: TrainCores) -> tuple[Tensor | None, Tensor]:
        """First (r1, s1), or None if its rank is full, and left (s1 * r2, s2), orthonormal together."""
        (r1, r2), (s1, s2, _) = s.row_modes, s.ranks
        if s1 == r1:
            left, _ = _train(self._middle.coordinates(self._weight.T, s2).T, (s2,))
            return None, left
        coordinates = self._middle.coordinates(self._weight.T, WIDTH * s2).T  # (rows, k)
        first, left, _ = _train(coordinates.reshape(r1, r2, -1), (s1, s2))
        return first, left.reshape(s1 * r2, s2)


def _checked(structure: Structure) -> TrainCores:
    assert isinstance(structure, TrainCores)
    return structure


def _train(tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """TT-SVD: orthonormal cores but for the last; the outer two as matrices."""
    import tensorly as tl  # half a second, for this method only
    from tensorly.decomposition import tensor_train

    with tl.backend_context("pytorch", local_threadsafe=True):
        first, *inner, last = tensor_train(tensor, rank=[1, *ranks, 1]).factors
    return [first[0], *inner, last[..., 0]]
