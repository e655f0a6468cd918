"""SVD low-rank: W ~ left @ right, the nearest matrix of rank r in Frobenius norm, plain or weighted.

Sources: Eckart and Young, Psychometrika 1 (1936), for the optimum; Halko, Martinsson and Tropp, SIAM Review 53
(2011), for the randomised range finder that is used for large weights. Weighted by what a layer sees, the optimum is
the truncated SVD of R^1/2 W C^1/2 with the roots taken off again: FWSVD (Hsu et al., ICLR 2022: rows), ASVD (Yuan et
al. 2023: a diagonal C), SVD-LLM (Wang et al., ICLR 2025: a full C, by Cholesky). Ours never inverts C: the weight is
projected on the leading left vectors of R^1/2 W C^1/2, so an input that no sample touches does no harm.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from compresskit.core.chain import Chain, LastAxis
from compresskit.core.cost import Gemm, Operation
from compresskit.core.decomposition import Analysis, Decomposition, squared_norm
from compresskit.core.folding import SINGLE_TAIL, gram, row_gram
from compresskit.core.importance import Importance
from compresskit.core.metric import Metric, Moment
from compresskit.core.native import Native
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec
from compresskit.errors import OptionError, StructureError

EXACT_SIDE = 2048
"""`auto` computes the whole spectrum up to this short side, whatever the rank (half a second there on two cores)."""
RANDOMIZED_SHARE = 1 / 8
"""Beyond, the range finder serves ranks up to this share of the short side. On 4096 x 11008 the whole spectrum takes
6 s, the range finder 1.5 s for rank 189 and 9 s for rank 746, with a larger error."""
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

    @cached_property
    def _chain(self) -> Chain:
        return Chain(self.cols, (LastAxis("right", 1, self.cols, self.rank), LastAxis("left", 1, self.rank, self.rows)))

    @property
    def native(self) -> Native | None:
        return self._chain.native

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return self._chain.run(x, factors, bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """rank * cols multiply-adds per row (`lookup_macs`), where a dense one copies cols numbers: a matrix product.

        At a rank of about a hundred that takes longer than twice the dense lookup, whoever multiplies (the `floor` in
        `python -m benchmarks report layers`); where lookups count, Kronecker embeddings (O(cols) per row) are cheaper.
        """
        return torch.embedding(factors["left"], index) @ factors["right"]

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
        solver: `exact`: eigendecomposition of the short side's Gram matrix; `randomized`: randomised range
            finder; `auto`: randomised for ranks up to an eighth of a short side above 2048, else exact.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "W ~ left @ right of rank r"
    source: ClassVar[str] = "Eckart and Young 1936; Halko, Martinsson and Tropp 2011; weighted: SVD-LLM, ASVD, FWSVD"
    structures: ClassVar[tuple[type[Structure], ...]] = (LowRank,)
    prices_at_once: ClassVar[bool] = True

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
        if self.solver == "randomized":
            return _RandomizedAnalysis(weight)
        if self.solver == "exact" or min(weight.shape) <= EXACT_SIDE:
            return _ExactAnalysis(weight)
        return _LargeAnalysis(weight)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        return _WeightedAnalysis(weight, importance)


@final
class _ExactAnalysis(Analysis):
    """Eigenvectors of the Gram matrix of the short side. W projected on the leading ones is the nearest low rank.

    In the weight's dtype where the largest rank asked for leaves out at least SINGLE_TAIL of the energy; where less
    is left out, float32 would blur small singular values, and float64 takes over at twice the time.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._energy = squared_norm(weight)
        self._tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        self._vectors = weight.new_empty(min(weight.shape), 0)  # leading first, as many as were asked for
        self._errors: list[float] = []  # of rank 0, 1, ...

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        ranks = [_rank(structure) for structure in structures]
        self._prepare(max(ranks, default=0))
        return [self._errors[rank] for rank in ranks]

    def _prepare(self, rank: int) -> None:
        if rank <= self._vectors.shape[1]:
            return
        self._vectors = torch.linalg.eigh(row_gram(self._tall.T)).eigenvectors[:, -rank:].flip(-1)
        norms = torch.linalg.vector_norm(self._tall @ self._vectors, dim=0)
        kept = [0.0, *norms.double().square().cumsum(0).tolist()]
        self._errors = [max(self._energy - energy, 0.0) for energy in kept]
        if self._errors[-1] < SINGLE_TAIL * self._energy:
            values, vectors = torch.linalg.eigh(gram(self._tall))
            self._vectors = vectors[:, -rank:].flip(-1).to(self._weight.dtype)
            self._errors = [0.0, *values.clamp_min(0).cumsum(0).tolist()][::-1]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        self._prepare(_rank(structure))
        basis = self._vectors[:, : _rank(structure)]  # (short, rank)
        coordinates = self._tall @ basis  # (long, rank)
        scale = torch.linalg.vector_norm(coordinates, dim=0).sqrt()
        coordinates = torch.where(scale > 0, coordinates / scale, 0.0)
        if self._tall is self._weight:
            return {"left": coordinates, "right": (basis * scale).T}
        return {"left": basis * scale, "right": coordinates.T}


@final
class _WeightedAnalysis(Analysis):
    """Eigenvectors of the Gram matrix of the short side of R^1/2 W C^1/2, in float64; their values price all ranks.

    Without R the weight is projected on left vectors, which takes no inverse of C; without C on right ones. With both,
    the root of R is taken off again, which the ridge keeps regular.
    """

    def __init__(self, weight: Tensor, importance: Importance) -> None:
        self._weight = weight
        self._importance = importance
        self._basis = weight.new_empty(0, 0)  # (side, rank), leading first, as many as were asked for
        self._errors: list[float] = []  # of rank 0, 1, ...
        self._by_rows = True  # whether the weight is projected on left vectors; else on right ones

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        ranks = [_rank(structure) for structure in structures]
        if ranks and not self._errors:
            self._prepare(max(ranks))
        return [self._errors[rank] for rank in ranks]

    def _prepare(self, rank: int) -> None:
        if self._errors and rank <= self._basis.shape[1]:
            return
        metric = self._importance.metric(self._weight)
        self._by_rows = not metric.cols.is_identity
        if self._by_rows and metric.rows.is_identity and self._weight.shape[0] <= self._weight.shape[1]:
            self._keep(rank, metric, *metric.gram(self._weight).eigen)
            return
        weight = metric.rows.root().before(self._weight.double())  # (rows, cols)
        side, moment = (weight, metric.cols) if self._by_rows else (weight.T, Moment(None))
        if side.shape[0] <= side.shape[1]:
            outer = row_gram(side) if moment.is_identity else moment.after(side) @ side.T
            values, basis = torch.linalg.eigh(outer)
        else:
            whitened = moment.whitened(side)
            values, vectors = torch.linalg.eigh(whitened.T @ whitened)
            basis = whitened @ vectors
        self._keep(rank, metric, values, basis)

    def _keep(self, rank: int, metric: Metric, values: Tensor, basis: Tensor) -> None:
        self._basis = basis[:, -rank:].flip(-1).to(self._weight.dtype)
        self._errors = [0.0, *(metric.scale * values.clamp_min(0)).cumsum(0).tolist()][::-1]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        self._prepare(_rank(structure))
        basis = self._basis[:, : _rank(structure)].double()
        basis = torch.linalg.qr(basis).Q  # vectors of a Gram matrix, rounded, lose their right angles
        weight, rows = self._weight.double(), self._importance.row_metric(self._weight)
        if self._by_rows:
            left, right = rows.inverse_root().before(basis), basis.T @ rows.root().before(weight)
        else:
            left, right = weight @ basis, basis.T
        scale = (torch.linalg.vector_norm(right, dim=1) / torch.linalg.vector_norm(left, dim=0)).sqrt()
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # split evenly: both train at one scale
        return {"left": (left * scale).to(self._weight.dtype), "right": (right.T / scale).T.to(self._weight.dtype)}


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


@final
class _LargeAnalysis(Analysis):
    """Randomised for ranks up to a share of the short side, exact from there on, where it is the quicker one."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._analysis: Analysis | None = None

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        return self._able(max(map(_rank, structures), default=1)).squared_errors(structures)

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        return self._able(_rank(structure)).factors(structure)

    def _able(self, rank: int) -> Analysis:
        """An analysis that may be asked for this rank; the one at hand if it is exact or the rank is small."""
        if rank > RANDOMIZED_SHARE * min(self._weight.shape):
            if not isinstance(self._analysis, _ExactAnalysis):
                self._analysis = _ExactAnalysis(self._weight)
        elif self._analysis is None:
            self._analysis = _RandomizedAnalysis(self._weight)
        return self._analysis


def _rank(structure: Structure) -> int:
    assert isinstance(structure, LowRank)
    return structure.rank
