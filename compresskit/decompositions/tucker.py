"""Tucker: the weight folded to a tensor of order 3, W ~ core x_n factors; a mode of full rank has no factor.

Sources: Tucker, Psychometrika 31 (1966); De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21
(2000), for HOSVD, the start, and HOOI, the refinement (tensorly). A square factor is orthogonal and goes into the
core, so truncated SVD is the special case that cuts the unfolded side only. Measured on all-MiniLM-L6-v2 it is
the best case of its size for almost every weight, and folding both sides (order 4) is clearly worse: the menu
folds one side. Weighted by what a layer sees: core/tucker_als.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from compresskit.core.chain import Chain, LastAxis, Step
from compresskit.core.cost import Gemm, Operation
from compresskit.core.decomposition import Analysis, Decomposition, squared_norm
from compresskit.core.folding import Unfolding, balanced_factors, rank_triples
from compresskit.core.hosvd import hooi, leading_energies
from compresskit.core.importance import Importance
from compresskit.core.metric import Metric
from compresskit.core.mixing import mix_operations, mix_orders, mix_steps
from compresskit.core.native import Native
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec
from compresskit.core.tucker_als import FoldedTucker
from compresskit.errors import OptionError, StructureError

HOOI_WIDTH = 4
"""HOOI works in the leading `HOOI_WIDTH * rank` HOSVD vectors of each mode; measured, more gain next to nothing."""

Pair = tuple[int, int]


@final
@dataclass(frozen=True)
class TuckerTensor(Structure):
    """W (rows, cols) = (row_first (x) row_last) @ core @ (col_first (x) col_last), (x) the Kronecker product.

    Rows are folded to `row_modes` (first, last), cols to `col_modes`; a side that is not folded is (1, n). The core
    is stored as a matrix (product of row ranks, product of col ranks), row factors as (size, rank), col factors as
    (rank, size). So all products but the `first` ones are plain `x @ factor.T`, and nothing is ever transposed.
    """

    kind: ClassVar[str] = "tucker"

    row_modes: Pair
    col_modes: Pair
    row_ranks: Pair
    col_ranks: Pair

    def validate(self) -> None:
        if {len(self.row_modes), len(self.col_modes), len(self.row_ranks), len(self.col_ranks)} != {2}:
            raise StructureError(f"each side of a Tucker tensor has two modes and two ranks, got {self}")
        if math.prod(self.row_modes) != self.rows or math.prod(self.col_modes) != self.cols:
            raise StructureError(f"modes {self.row_modes} and {self.col_modes} do not make {self.rows} x {self.cols}")
        if not _possible(self.modes, self.ranks):
            raise StructureError(
                f"ranks {self.ranks} of modes {self.modes}: each is 1 to the size of its mode and, if below it, at "
                "most the product of the others"
            )

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of the tensor: row first, row last, col first, col last."""
        return self.row_modes + self.col_modes

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.row_ranks + self.col_ranks

    def factor_specs(self) -> dict[str, TensorSpec]:
        (n1, n2), (m1, m2), (r1, r2), (q1, q2) = self.row_modes, self.col_modes, self.row_ranks, self.col_ranks
        specs = {
            "row_first": TensorSpec((n1, r1)),
            "row_last": TensorSpec((n2, r2), matrix=True),
            "core": TensorSpec((r1 * r2, q1 * q2), matrix=True),
            "col_first": TensorSpec((q1, m1)),
            "col_last": TensorSpec((q2, m2), matrix=True),
        }
        full = {"row_first": r1 == n1, "row_last": r2 == n2, "col_first": q1 == m1, "col_last": q2 == m2}
        return {name: spec for name, spec in specs.items() if not full.get(name, False)}

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        columns = factors["core"].t()
        for step in mix_steps(self.row_ranks, self.row_modes, "row_first", "row_last"):
            columns = step.run(columns, factors[step.factor])
        return self._expand_cols(columns.T, factors)

    @cached_property
    def _expansion(self) -> tuple[Step, ...]:
        """Steps from column ranks to columns, by the transposed factors."""
        return mix_steps(self.col_ranks, self.col_modes, "col_first", "col_last")

    @cached_property
    def _chain(self) -> Chain:
        core = LastAxis("core", 1, math.prod(self.col_ranks), math.prod(self.row_ranks))
        before = mix_steps(self.col_modes, self.col_ranks, "col_first", "col_last")
        return Chain(self.cols, (*before, core, *mix_steps(self.row_ranks, self.row_modes, "row_first", "row_last")))

    @property
    def native(self) -> Native | None:
        return self._chain.native

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        return self._chain.run(x, factors, bias)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return self._expand_cols(self._core_rows(index, factors), factors)

    def _core_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Rows of (row_first (x) row_last) @ core: (...) -> (..., product of col ranks)."""
        core, first, last = factors["core"], factors.get("row_first"), factors.get("row_last")
        (n1, n2), (r1, r2) = self.row_modes, self.row_ranks
        if first is None and last is None:
            return torch.embedding(core, index)
        if n1 == 1 and last is not None:
            return torch.embedding(last, index) @ core
        i, j = index // n2, index % n2
        if first is not None and last is not None:
            outer = torch.embedding(first, i)[..., :, None] * torch.embedding(last, j)[..., None, :]  # (..., r1, r2)
            return outer.flatten(-2) @ core
        if first is not None:
            mix, rows = torch.embedding(first, i), j[..., None] + r2 * torch.arange(r1, device=index.device)
        else:
            assert last is not None
            mix, rows = torch.embedding(last, j), i[..., None] * r2 + torch.arange(r2, device=index.device)
        return (mix[..., None, :] @ torch.embedding(core, rows)).squeeze(-2)

    def _expand_cols(self, z: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Z @ (col_first (x) col_last): (..., product of col ranks) -> (..., cols)."""
        for step in self._expansion:
            z = step.run(z, factors[step.factor].t())
        return z

    @property
    def macs(self) -> int:
        core = math.prod(self.ranks)
        return min(mix_orders(self.col_modes, self.col_ranks)) + core + min(mix_orders(self.row_ranks, self.row_modes))

    def operations(self, tokens: int) -> Sequence[Operation]:
        core = Gemm(tokens, math.prod(self.row_ranks), math.prod(self.col_ranks))
        last = () if self.row_ranks == self.row_modes else mix_operations(self.row_ranks, self.row_modes, tokens)
        return (*mix_operations(self.col_modes, self.col_ranks, tokens), core, *last)

    @property
    def lookup_macs(self) -> int:
        (n1, n2), (r1, r2) = self.row_modes, self.row_ranks
        expand = min(mix_orders(self.col_ranks, self.col_modes))
        if self.row_ranks == self.row_modes:
            return expand
        mixed = (r1 if r1 < n1 else 1) * (r2 if r2 < n2 else 1)  # rows of the core that make up one row
        outer = mixed if r1 < n1 and r2 < n2 else 0
        return outer + mixed * math.prod(self.col_ranks) + expand


def _possible(modes: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether each rank fits its mode and, if it cuts it, does not exceed the other ranks' product."""
    size = math.prod(ranks)
    return all(1 <= rank <= n and (rank == n or rank * rank <= size) for n, rank in zip(modes, ranks, strict=True))


@register
@final
@dataclass(frozen=True)
class Tucker(Decomposition):
    """Tucker decomposition of the folded weight: HOSVD, then HOOI if more than one mode is cut.

    Args:
        fold: the side that is split into two modes; the other one where this side's size is prime. Embeddings, whose
            rows are looked up one at a time, fold the columns.
        heads: size of the folded side's first mode where it divides; None: the two factors nearest to each other.
        ranks: fixed ranks (first folded mode, last folded mode, other side); None: the budget chooses.
        sweeps: HOOI iterations (of alternating least squares in a weighted fit); 0: truncated HOSVD.
    """

    name: ClassVar[str] = "tucker"
    summary: ClassVar[str] = "W folded to a 3-way tensor ~ core x_1 U1 x_2 U2 x_3 U3"
    source: ClassVar[str] = "Tucker 1966; De Lathauwer, De Moor and Vandewalle 2000; tensorly"
    structures: ClassVar[tuple[type[Structure], ...]] = (TuckerTensor,)

    fold: Literal["rows", "cols"] = "rows"
    heads: int | None = None
    ranks: tuple[int, int, int] | None = None
    sweeps: int = 2

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads < 1:
            raise OptionError(f"heads is a number of attention heads, at least 1; got {self.heads}")
        if self.ranks is not None and min(self.ranks) < 1:
            raise OptionError(f"the ranks of a Tucker tensor are at least 1; got {self.ranks}")
        if self.sweeps < 0:
            raise OptionError(f"sweeps is a number of HOOI iterations, at least 0; got {self.sweeps}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        by_rows = not lookup and self._folds_rows(rows, cols)
        modes, other = self._split(rows if by_rows else cols), cols if by_rows else rows
        triples = [self.ranks] if self.ranks else rank_triples(*modes, lambda r1, r2: min(other, r1 * r2))
        for r1, r2, rank in triples:
            if not _possible((*modes, other), (r1, r2, rank)):
                continue
            folded, plain = (modes, (r1, r2)), ((1, other), (1, rank))
            (row_modes, row_ranks), (col_modes, col_ranks) = (folded, plain) if by_rows else (plain, folded)
            structure = TuckerTensor(rows, cols, row_modes, col_modes, row_ranks, col_ranks)
            if structure.num_params < rows * cols >= structure.macs:
                yield structure

    def _split(self, n: int) -> Pair:
        return (self.heads, n // self.heads) if self.heads and n % self.heads == 0 else balanced_factors(n)

    def _folds_rows(self, rows: int, cols: int) -> bool:
        row_fold, col_fold = self._split(rows)[0] > 1, self._split(cols)[0] > 1
        return row_fold if self.fold == "rows" else row_fold and not col_fold

    def analyse(self, weight: Tensor) -> Analysis:
        return _TuckerAnalysis(weight, self.sweeps)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        return _WeightedAnalysis(weight, importance, self.sweeps)


@final
class _TuckerAnalysis(Analysis):
    """HOSVD: the energy of every leading block of the full core prices all ranks; HOOI starts from such a block."""

    def __init__(self, weight: Tensor, sweeps: int) -> None:
        self._weight = weight
        self._energy = squared_norm(weight)
        self._sweeps = sweeps
        self._unfoldings: dict[tuple[tuple[int, ...], int], Unfolding] = {}
        self._rotated: Tensor | None = None

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        tuckers = [_checked(structure) for structure in structures]
        kept: dict[tuple[int, ...], Mapping[tuple[int, ...], float]] = {}
        for modes in dict.fromkeys(s.modes for s in tuckers):
            ranks = [sorted({s.ranks[axis] for s in tuckers if s.modes == modes}) for axis in range(len(modes))]
            cuts = [[rank for rank in own if rank < n] for n, own in zip(modes, ranks, strict=True)]
            cut = {axis: own[-1] for axis, own in enumerate(cuts) if own}
            for axis, most in cut.items():
                self._unfolding(modes, axis, most)
            kept[modes] = leading_energies(self._project(modes, {axis: ranks[axis][-1] for axis in cut}), ranks)
            for axis, most in cut.items():
                self._unfolding(modes, axis).keep(most)
        return [max(self._energy - kept[s.modes][s.ranks], 0.0) for s in tuckers]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        s = _checked(structure)
        cut = _cut(s)
        scale = max(self._weight.max(), -self._weight.min())
        wide = len(cut) > 1 and bool(scale > 0)
        widths = {axis: s.ranks[axis] * (HOOI_WIDTH if wide else 1) for axis in cut}
        for axis, width in widths.items():
            self._unfolding(s.modes, axis, width)
        core = self._project(s.modes, widths)
        bases = {a: self._unfolding(s.modes, a).basis(self._unfolded(s.modes, a), core.shape[a]) for a in cut}
        if wide:
            core, rotations = hooi(core / scale, {axis: s.ranks[axis] for axis in cut}, self._sweeps)
            core = core * scale
            bases = {axis: bases[axis] @ rotations[axis] for axis in cut}
        return _stored(s, core, bases)

    def _unfolded(self, modes: tuple[int, ...], axis: int) -> Tensor:
        tensor = self._weight.reshape(modes)
        if axis > 1 and modes[0] == 1 and modes[1] > self._weight.shape[1]:
            tensor = self._short().view(1, -1, *modes[2:])
        return tensor.movedim(axis, 0).flatten(1)

    def _short(self) -> Tensor:
        """(cols, cols): the weight with its many rows rotated into as few, which the columns' unfoldings do not see."""
        if self._rotated is None:
            self._rotated = Unfolding(self._weight).coordinates(self._weight, self._weight.shape[1])
        return self._rotated

    def _unfolding(self, modes: tuple[int, ...], axis: int, leading: int = 0) -> Unfolding:
        """Of an axis, sound in at least so many leading components: the one at hand where it is."""
        known = self._unfoldings.get((modes, axis))
        if known is None or known.sound < min(leading, len(known.energies)):
            known = self._unfoldings[modes, axis] = Unfolding(self._unfolded(modes, axis), leading)
        return known

    def _project(self, modes: tuple[int, ...], widths: Mapping[int, int]) -> Tensor:
        """The weight in the leading HOSVD vectors of some modes: the leading block of the full core, other modes whole.

        The longest mode goes first: it alone can be longer than the others together, and it shrinks the most.
        """
        tensor = self._weight.reshape(modes)
        for axis in sorted(widths, key=lambda axis: -modes[axis]):
            moved = tensor.movedim(axis, 0)
            part = self._unfolding(modes, axis).coordinates(moved.flatten(1), widths[axis])
            tensor = part.unflatten(1, moved.shape[1:]).movedim(0, axis)
        return tensor


def _checked(structure: Structure) -> TuckerTensor:
    assert isinstance(structure, TuckerTensor)
    return structure


def _cut(structure: TuckerTensor) -> list[int]:
    """Axes whose rank is below their size: those with a factor."""
    return [axis for axis, (n, rank) in enumerate(zip(structure.modes, structure.ranks, strict=True)) if rank < n]


def _levelled(core: Tensor, bases: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The same product with the core's scale spread evenly over core and factors, so that all train at one scale."""
    shares: dict[int, Tensor] = {}
    for axis in bases:
        norms = torch.linalg.vector_norm(core.movedim(axis, 0).flatten(1), dim=1, dtype=torch.float64)
        shares[axis] = norms.pow(1 / (len(bases) + 1)).to(core.dtype)
    for axis, share in shares.items():
        column = share.view([-1 if a == axis else 1 for a in range(core.dim())])
        core = torch.where(column > 0, core / column, 0.0)
    return core, {axis: basis * shares[axis] for axis, basis in bases.items()}


def _stored(s: TuckerTensor, core: Tensor, bases: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Factors by name from a core of order 4 and an orthonormal basis for each axis that is cut."""
    core, bases = _levelled(core, bases)
    names = ("row_first", "row_last", "col_first", "col_last")
    factors = {names[axis]: basis if axis < 2 else basis.T for axis, basis in bases.items()}
    factors["core"] = core.reshape(math.prod(s.row_ranks), math.prod(s.col_ranks))
    return {name: factors[name] for name in s.factor_specs()}


@final
class _WeightedAnalysis(Analysis):
    """Alternating least squares; a problem for each way that a side is folded."""

    def __init__(self, weight: Tensor, importance: Importance, sweeps: int) -> None:
        self._weight = weight
        self._metric = importance.metric(weight)
        self._sweeps = sweeps
        self._problems: dict[tuple[bool, Pair], FoldedTucker] = {}
        self._errors: dict[tuple[bool, Pair, Pair], list[float]] = {}

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        return [self._price(_checked(structure)) for structure in structures]

    def _price(self, s: TuckerTensor) -> float:
        by_rows, modes, ranks, rank = _folded(s)
        key = (by_rows, modes, ranks)
        if key not in self._errors:
            self._errors[key] = self._problem(by_rows, modes).errors(ranks)
        errors = self._errors[key]
        return self._metric.scale * errors[min(rank, len(errors) - 1)]

    def _problem(self, by_rows: bool, modes: Pair) -> FoldedTucker:
        if (by_rows, modes) not in self._problems:
            rows, cols, scale = self._metric.rows, self._metric.cols, self._metric.scale
            metric = self._metric if by_rows else Metric(cols, rows, scale)
            self._problems[by_rows, modes] = FoldedTucker(self._weight if by_rows else self._weight.T, metric, modes)
        return self._problems[by_rows, modes]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        s = _checked(structure)
        by_rows, modes, ranks, rank = _folded(s)
        problem, size = self._problem(by_rows, modes), s.cols if by_rows else s.rows
        state = problem.fit(ranks, min(rank, math.prod(ranks)), self._sweeps)
        bases = {axis: basis for axis, basis in enumerate((state.first, state.last)) if ranks[axis] < modes[axis]}
        core = state.left
        if rank == size:
            core = problem.whole(state)
        else:
            basis, triangle = torch.linalg.qr(problem.right(state).T)  # (size, rank)
            bases[3], core = basis, core @ triangle.T
        grid = core.view(*ranks, 1, -1)
        if not by_rows:
            grid = grid.permute(2, 3, 0, 1)
            bases = {(axis + 2) % 4: basis for axis, basis in bases.items()}
        dtype = self._weight.dtype
        return _stored(s, grid.to(dtype), {axis: basis.to(dtype) for axis, basis in bases.items()})


def _folded(s: TuckerTensor) -> tuple[bool, Pair, Pair, int]:
    """Whether the rows are the folded side, its modes and ranks, and the rank of the other side."""
    if s.col_modes[0] == 1:
        return True, s.row_modes, s.row_ranks, s.col_ranks[1]
    if s.row_modes[0] == 1:
        return False, s.col_modes, s.col_ranks, s.row_ranks[1]
    raise StructureError(f"{s} folds both sides; a weighted fit is possible where one is folded")
