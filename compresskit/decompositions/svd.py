"""SVD low-rank: W ~ left @ right, the nearest matrix of rank r in Frobenius norm.

Source: Eckart and Young, Psychometrika 1 (1936), for the optimum; Halko, Martinsson and Tropp, SIAM Review 53
(2011), for the randomised range finder that is used for large weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core.cost import Gemm, Operation
from compresskit.core.decomposition import Analysis, Decomposition, squared_norm
from compresskit.core.folding import gram
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec, linear
from compresskit.errors import OptionError, StructureError

EXACT_SIDE = 2048
"""`auto` computes the whole spectrum up to this short side (about a second there on two cores)."""
OVERSAMPLING = 32
POWER_ITERATIONS = 4
"""Then, on the weights of all-MiniLM-L6-v2, the error is within 1 % of the optimum up to half of the full rank."""


@final
@dataclass(frozen=True)
class LowRank(Structure):
    """W (rows, cols) = left (rows, rank) @ right (rank, cols)."""

    kind: ClassVar[str] = "low-rank"

    rank: int

    def validate(self) -> None:
        if not 1 <= self.rank <= min(self.rows, self.cols):
            raise StructureError(f"the rank of a {self.rows} x {self.cols} weight is 1 to {min(self.rows, self.cols)}")

    def factor_specs(self) -> dict[str, TensorSpec]:
        return {
            "left": TensorSpec((self.rows, self.rank), matrix=True),
            "right": TensorSpec((self.rank, self.cols), matrix=True),
        }

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        return factors["left"] @ factors["right"]

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return linear(linear(x, factors["right"]), factors["left"], bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return F.embedding(index, factors["left"]) @ factors["right"]

    @property
    def macs(self) -> int:
        return self.rank * (self.rows + self.cols)

    @property
    def lookup_macs(self) -> int:
        return self.rank * self.cols

    def operations(self, tokens: int) -> Sequence[Operation]:
        return (Gemm(tokens, self.rank, self.cols), Gemm(tokens, self.rows, self.rank))


@register
@final
@dataclass(frozen=True)
class SVD(Decomposition):
    """Truncated singular value decomposition, the square roots of the singular values split between both factors.

    Args:
        rank: this rank everywhere; None: the budget chooses.
        solver: `exact`: eigendecomposition of the short side's Gram matrix in float64; `randomized`: randomised range
            finder; `auto`: exact up to a short side of 2048, randomised beyond.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "W ~ left @ right of rank r"
    source: ClassVar[str] = "Eckart and Young 1936; Halko, Martinsson and Tropp 2011"
    structures: ClassVar[tuple[type[Structure], ...]] = (LowRank,)

    rank: int | None = None
    solver: Literal["auto", "exact", "randomized"] = "auto"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"rank is a count, at least 1; got {self.rank}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        if self.rank is not None:
            if self.rank <= min(rows, cols):
                yield LowRank(rows, cols, self.rank)
            return
        for rank in range(1, rows * cols // (rows + cols) + 1):
            yield LowRank(rows, cols, rank)

    def analyse(self, weight: Tensor) -> Analysis:
        exact = self.solver == "exact" or (self.solver == "auto" and min(weight.shape) <= EXACT_SIDE)
        return _ExactAnalysis(weight) if exact else _RandomizedAnalysis(weight)


@final
class _ExactAnalysis(Analysis):
    """Eigenvectors of the Gram matrix of the short side. W projected on the leading ones is the nearest low rank."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._wide = weight.shape[0] < weight.shape[1]
        values, self._vectors = self._eigen()  # (short,) smallest first, (short, short) leading first
        self._tails = [0.0, *values.clamp_min(0).cumsum(0).tolist()]  # error if all but the k last are dropped

    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(gram(self._weight.T if self._wide else self._weight))
        return values, vectors.flip(-1).to(self._weight.dtype)

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        """Vectors beyond the largest rank that is priced are forgotten: a model has many weights."""
        ranks = [_rank(structure) for structure in structures]
        self._vectors = self._vectors[:, : max(ranks, default=1)].clone()
        return [self._tails[len(self._tails) - 1 - rank] for rank in ranks]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        if self._vectors.shape[1] < _rank(structure):
            self._vectors = self._eigen()[1]
        basis = self._vectors[:, : _rank(structure)]  # (short, rank)
        coordinates = (self._weight.T if self._wide else self._weight) @ basis  # (long, rank)
        scale = torch.linalg.vector_norm(coordinates, dim=0).sqrt()
        coordinates = torch.where(scale > 0, coordinates / scale, 0.0)
        if self._wide:
            return {"left": basis * scale, "right": coordinates.T}
        return {"left": coordinates, "right": (basis * scale).T}


@final
class _RandomizedAnalysis(Analysis):
    """Leading singular triples by a randomised range finder, as many as the largest rank that was asked for."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._energy = squared_norm(weight)
        self._triples: tuple[Tensor, Tensor, Tensor] | None = None

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        if not structures:
            return []
        _, values, _ = self._leading(max(_rank(s) for s in structures))
        kept = values.double().square().cumsum(0)
        return [max(self._energy - float(kept[_rank(s) - 1]), 0.0) for s in structures]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        rank = _rank(structure)
        left, values, right = self._leading(rank)
        root = values[:rank].sqrt()  # split evenly, so that both factors train at one scale
        return {"left": left[:, :rank] * root, "right": (right[:, :rank] * root).T}

    def _leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, k), (k,), (cols, k) with k >= rank. The generator is our own: the global one stays untouched."""
        if self._triples is None or len(self._triples[1]) < rank:
            size = min(rank + OVERSAMPLING, *self._weight.shape)
            generator = torch.Generator(self._weight.device).manual_seed(0)
            probe = torch.randn(
                self._weight.shape[1], size, generator=generator, dtype=self._weight.dtype, device=self._weight.device
            )
            basis = torch.linalg.qr(self._weight @ probe).Q
            for _ in range(POWER_ITERATIONS):
                basis = torch.linalg.qr(self._weight @ torch.linalg.qr(self._weight.T @ basis).Q).Q
            left, values, right = torch.linalg.svd(basis.T @ self._weight, full_matrices=False)
            self._triples = basis @ left, values, right.T
        return self._triples


def _rank(structure: Structure) -> int:
    assert isinstance(structure, LowRank)
    return structure.rank
