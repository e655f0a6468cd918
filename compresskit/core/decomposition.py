"""Decomposition: how a weight becomes factors. One file below `decompositions/` per decomposition.

weight -> analyse -> Analysis -> squared_errors -> (a structure is chosen) -> factors -> Fitted -> module
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from compresskit.core.importance import Importance
from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear
from compresskit.core.structure import Structure
from compresskit.errors import BudgetError, OptionError, StructureError, WeightError

CHUNK_ROWS = 4096
"""Rows of a tall weight that are rebuilt at a time."""
CHUNK_ELEMENTS = 2**18
"""Elements of a weight that are worked on at a time: they stay in the processor's cache."""


class Analysis(ABC):
    """What a decomposition knows of one weight: prices every structure and then fits the chosen one.

    Expensive parts (a spectrum, a Gram matrix) are computed once and kept, so pricing and fitting share them.
    """

    @abstractmethod
    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        """Expected `||W - dense||_F^2` of each structure; never less, beyond rounding, than what `factors` reaches.

        In a weighted analysis: tr(R D C D^T) of the difference D, as `Importance.squared_norm` measures it.
        """

    def squared_errors_beside(self, structures: Sequence[Structure], rivals: Sequence[float]) -> list[float]:
        """The same, where each only counts if it is lower than that of a rival structure of another method.

        What hardly will be may have a rougher price, from above, or infinity; by default all are as without rivals.

        Args:
            rivals: the least squared error that others reach with as many parameters, for each of the structures.
        """
        return self.squared_errors(structures)

    @abstractmethod
    def factors(self, structure: Structure) -> dict[str, Tensor]:
        """Best factors found for this structure, in the dtype of the analysed weight."""

    def shrink(self) -> None:  # noqa: B027 - most are small
        """Give up what takes memory and can be computed again; what took long and is small stays known."""


@dataclass(frozen=True)
class Decomposition(ABC):
    """A way to factorise a weight, with its options as fields; subclasses are frozen dataclasses without state."""

    name: ClassVar[str]
    """What a user types."""
    summary: ClassVar[str]
    """One line: the formula."""
    source: ClassVar[str]
    """Paper, and where our choice departs from it."""
    structures: ClassVar[tuple[type[Structure], ...]]
    """The structure classes that it fits; they are registered with it, so that checkpoints load."""
    prices_at_once: ClassVar[bool] = False
    """Whether a few factorisations price the whole menu, with an importance too, and not each structure a search."""
    prices_dearly: ClassVar[bool] = False
    """Whether prices take so much longer than those of others that, beside others, only structures near the size are
    priced that the budget has given a weight without them."""

    @abstractmethod
    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        """Structures worth pricing for a weight of this shape, given the options; no linear algebra here.

        Args:
            lookup: rows are taken one at a time (an embedding): only structures with a cheap `take_rows`.
        """

    @abstractmethod
    def analyse(self, weight: Tensor) -> Analysis:
        """Analysis of a finite float32 or float64 weight (rows, cols). It may keep a reference, and never writes."""

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        """Analysis that fits for the least weighted error; for those decompositions that can.

        Args:
            weight: like that of `analyse`.
            importance: of a weight of this shape, not the identity.

        Raises:
            OptionError: this decomposition has no data-aware fit.
        """
        from compresskit.core.registry import decompositions  # which imports this module

        able = ", ".join(name for name, cls in decompositions().items() if cls.is_data_aware())
        raise OptionError(f"{self.name} has no data-aware fit; leave the importance out, or use one that has: {able}")

    def fitter(self, structure: Structure) -> "Decomposition":
        """Who fits this structure: itself, unless it is one that chooses between others."""
        return self

    def alone(self) -> Mapping[str, "Decomposition"]:
        """By name of each method that it chooses between: the same with that one alone. Empty for one that does not."""
        return {}

    def recovers(self, structure: Structure) -> bool:
        """Whether a weight that is exactly of this structure is fitted without error; false for a local search."""
        return True

    @final
    @classmethod
    def is_data_aware(cls) -> bool:
        """Whether `fit` takes an importance."""
        return cls.analyse_weighted is not Decomposition.analyse_weighted

    @final
    def analyse_for(self, weight: Tensor, importance: Importance | None) -> Analysis:
        """`analyse_weighted`, or `analyse` where there is nothing to weigh by.

        Raises:
            ImportanceError: the importance is of a weight of another shape.
            OptionError: this decomposition has no data-aware fit.
        """
        if importance is None:
            return self.analyse(weight)
        importance.check(*weight.shape)
        return self.analyse(weight) if importance.is_identity else self.analyse_weighted(weight, importance)

    @final
    def fit(
        self,
        weight: Tensor,
        *,
        ratio: float | None = None,
        structure: Structure | None = None,
        importance: Importance | None = None,
    ) -> "Fitted":
        """Factors of `weight`, of the given structure or of the best one at least `ratio` times smaller.

        Args:
            weight: (rows, cols), any floating dtype; half precision is widened to float32 for the fit.
            ratio: parameters of the weight / parameters of the factors, at least 1.
            structure: exactly this one; give either `ratio` or `structure`.
            importance: which errors matter; None: all alike.

        Raises:
            ImportanceError: the importance is of a weight of another shape.
            OptionError: an importance is given, and this decomposition has no data-aware fit.
            WeightError: not a real floating-point matrix, or it holds NaN or infinity.
            BudgetError: no structure of the menu is that small.
            StructureError: neither or both given, or the structure has another shape.
        """
        matrix = as_matrix(weight)
        if (ratio is None) == (structure is None):
            raise StructureError("fit takes either ratio= or structure=")
        analysis = self.analyse_for(matrix, importance)
        if structure is None:
            assert ratio is not None
            structure = self._choose(analysis, *matrix.shape, ratio=ratio)
        return self.fit_analysed(matrix, analysis, structure, importance).to(weight.dtype)

    @final
    def fit_analysed(
        self, weight: Tensor, analysis: Analysis, structure: Structure, importance: Importance | None = None
    ) -> "Fitted":
        """`fit` of a widened weight whose analysis (`analyse_for`) is at hand; measures the errors itself."""
        if (structure.rows, structure.cols) != tuple(weight.shape):
            raise StructureError(
                f"{structure} is for a weight of {structure.rows} x {structure.cols}, this one is "
                f"{weight.shape[0]} x {weight.shape[1]}"
            )
        if not isinstance(structure, self.structures):
            raise StructureError(f"{self.name} does not fit structures of kind {structure.kind!r}")
        factors = {name: tensor.contiguous() for name, tensor in analysis.factors(structure).items()}
        weighted = None if importance is None else _weighted_error(weight, structure, factors, importance)
        return Fitted(structure, factors, _fit_error(weight, structure, factors), weighted)

    @final
    def _choose(self, analysis: Analysis, rows: int, cols: int, *, ratio: float) -> Structure:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise BudgetError(f"ratio is original / compressed parameters, at least 1; got {ratio}")
        budget = rows * cols / ratio
        menu = list(self.menu(rows, cols))
        if not menu:
            raise BudgetError(f"{self} has no structure for {rows} x {cols}; other options may have")
        fitting = [structure for structure in menu if structure.num_params <= budget]
        if not fitting:
            highest = rows * cols / min(structure.num_params for structure in menu)
            raise BudgetError(
                f"{self.name} has no structure for {rows} x {cols} with at most {budget:,.0f} parameters (ratio "
                f"{ratio:g}); the highest ratio it reaches here is {math.floor(highest * 100) / 100:.2f}"
            )
        near = [structure for structure in fitting if structure.num_params >= budget / 2] or fitting
        errors = analysis.squared_errors(near)
        return min(zip(errors, near, strict=True), key=lambda pair: (pair[0], pair[1].macs, pair[1].num_params))[1]


@final
@dataclass(frozen=True)
class Fitted:
    """A fitted weight: sizes, tensors, and the error that was measured after the fit.

    Args:
        structure: sizes of the factorisation.
        factors: contiguous tensors by factor name, all of one dtype.
        relative_error: `||W - dense||_F / ||W||_F`; 0 for a zero weight.
        weighted_error: sqrt(tr(R D C D^T) / tr(R W C W^T)) of the difference D and the importance that was given, 0 if
            nothing weighs; None without an importance.
    """

    structure: Structure
    factors: Mapping[str, Tensor] = field(repr=False)
    relative_error: float
    weighted_error: float | None = None

    def to(self, dtype: torch.dtype) -> "Fitted":
        """The same fit with its factors in another dtype; the error stays the one measured before rounding."""
        factors = {name: tensor.to(dtype) for name, tensor in self.factors.items()}
        return Fitted(self.structure, factors, self.relative_error, self.weighted_error)

    def bias_change(self, weight: Tensor, mean: Tensor) -> Tensor:
        """(W - dense) @ mean (rows,): added to the bias, the layer answers its mean input as before.

        Args:
            weight: the one that was fitted (rows, cols).
            mean: mean input of the layer (cols,).
        """
        matrix = as_matrix(weight)
        mean = mean.to(matrix.device, matrix.dtype)
        factors = {name: tensor.to(matrix.dtype) for name, tensor in self.factors.items()}
        return matrix @ mean - self.structure.matmul(mean, factors)

    def to_module(self, like: nn.Module | None = None) -> nn.Module:
        """A module that computes with copies of the factors.

        Args:
            like: the layer that it replaces (nn.Linear, nn.Embedding or transformers' Conv1D): its bias, padding row,
                dtype, device and training mode are taken over. Without it: a FactorizedLinear without bias.

        Raises:
            StructureError: the weight of `like` has another shape.
        """
        if like is None:
            return FactorizedLinear(self.structure, {name: tensor.clone() for name, tensor in self.factors.items()})
        weight = like.weight
        assert isinstance(weight, Tensor)
        shape = tuple(weight.T.shape if is_conv1d(like) else weight.shape)
        if shape != (self.structure.rows, self.structure.cols):
            raise StructureError(
                f"these factors are of a weight of {self.structure.rows} x {self.structure.cols}, that of the "
                f"{type(like).__name__} to replace is {' x '.join(map(str, shape))}"
            )
        factors = {
            name: nn.Parameter(tensor.to(weight.device, weight.dtype, copy=True), weight.requires_grad)
            for name, tensor in self.factors.items()
        }
        return module_from(self.structure, factors, like)


def module_from(structure: Structure, factors: Mapping[str, nn.Parameter], like: nn.Module) -> nn.Module:
    """A factorised module with exactly these parameters in place of `like`."""
    module: nn.Module
    if isinstance(like, nn.Embedding):
        idx = like.padding_idx
        row = None if idx is None else like.weight[idx].detach().clone()
        module = FactorizedEmbedding(structure, factors, padding_idx=idx, padding_row=row)
    else:
        bias = getattr(like, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        module = FactorizedLinear(structure, factors, bias)
        module.stored_transposed = is_conv1d(like)
    return module.train(like.training)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def as_matrix(weight: Tensor, name: str = "this weight") -> Tensor:
    """`weight` detached, as a float32 or float64 matrix without NaN or infinity.

    Raises:
        WeightError: it is not a real floating-point matrix, is empty, or holds NaN or infinity.
    """
    if weight.dim() != 2 or 0 in weight.shape:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}; a matrix (rows, cols) is needed")
    if not weight.is_floating_point():
        raise WeightError(f"{name} is of {weight.dtype}; only real floating-point weights can be factorised")
    matrix = weight.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if not math.isfinite(squared_norm(matrix)):
        if torch.isfinite(matrix).all():
            raise WeightError(f"{name} holds values up to {float(matrix.abs().max()):.1e}, too large to be squared")
        nan, inf = int(matrix.isnan().sum()), int(matrix.isinf().sum())
        raise WeightError(f"{name} holds {nan} NaN and {inf} infinite values; mend the checkpoint first")
    return matrix


def squared_norm(matrix: Tensor) -> float:
    """`||matrix||_F^2`: row by row in the matrix's own dtype, the rows added up in float64.

    On a float32 weight that agrees with float64 throughout to 1e-8 and takes a fourteenth of its time.
    """
    rows = matrix if matrix.stride(-1) == 1 else matrix.T
    return float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """`||weight - approximation||_F / ||weight||_F`, 0 if both are zero; safe from overflow."""
    return _relative_error(weight, lambda start, stop: approximation[start:stop])


def _fit_error(weight: Tensor, structure: Structure, factors: Mapping[str, Tensor]) -> float:
    """The same for factors; a tall weight (an embedding) is rebuilt some rows at a time."""
    if len(weight) <= CHUNK_ROWS:
        return relative_error(weight, structure.dense(factors))
    rows = torch.arange(len(weight), device=weight.device)
    return _relative_error(weight, lambda start, stop: structure.take_rows(rows[start:stop], factors))


def _weighted_error(
    weight: Tensor, structure: Structure, factors: Mapping[str, Tensor], importance: Importance
) -> float:
    """sqrt(tr(R D C D^T) / tr(R W C W^T)); a tall weight is rebuilt some rows at a time, unless R couples them."""
    if len(weight) <= CHUNK_ROWS or (importance.rows is not None and importance.rows.dim() == 2):
        error = importance.squared_norm(weight - structure.dense(factors))
    else:
        error = 0.0
        for start in range(0, len(weight), CHUNK_ROWS):
            rows = torch.arange(start, min(start + CHUNK_ROWS, len(weight)), device=weight.device)
            difference = weight[start : start + CHUNK_ROWS] - structure.take_rows(rows, factors)
            error += importance.of_rows(start, start + CHUNK_ROWS).squared_norm(difference)
    energy = importance.squared_norm(weight)
    return math.sqrt(error / energy) if energy else 0.0


def _relative_error(weight: Tensor, approximation: Callable[[int, int], Tensor]) -> float:
    """In pieces, each divided by the largest value of all, so that no square overflows or vanishes."""
    low, high = weight.aminmax()
    scale = max(float(high), -float(low)) or 1.0
    step = max(CHUNK_ELEMENTS // weight.shape[1], 1)
    error = energy = 0.0
    for start in range(0, len(weight), CHUNK_ROWS):
        mine, theirs = weight[start : start + CHUNK_ROWS], approximation(start, start + CHUNK_ROWS)
        for one, other in zip(mine.split(step), theirs.split(step), strict=True):
            error += squared_norm((one - other).div_(scale))
            energy += squared_norm(one / scale)
    return math.sqrt(error / energy) if energy else (0.0 if error == 0 else math.inf)
