"""Importance: which errors of a weight matter, as second moments of what the layer sees; the identity where unknown.

A layer answers y = W x. With C the second moment of its inputs x, a change D of W changes its answers by tr(D C D^T) on
average; with R the second moment of the loss's gradients at its outputs (K-FAC: Martens and Grosse, ICML 2015; one
number per row: FWSVD, Hsu et al., ICLR 2022), the loss by about tr(R D C D^T). SVD-LLM (Wang et al., ICLR 2025): R = I
with a full C, ASVD (Yuan et al. 2023) R = I with a diagonal one, an embedding has C = I and its tokens' frequencies as
a diagonal R.
"""

import math
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from compresskit.core.metric import ASYMMETRY, Metric, Moment
from compresskit.errors import ImportanceError

RIDGE = 1e-6
"""Share of the mean of the diagonal that fits add to a diagonal by default. Second moments are rank deficient: what no
sample touches costs next to nothing, but what is least is still well defined."""
CANCELLED = 0.05
"""Where centring leaves less than this share of a second moment, the rounding of its sums is mended: what is left of
a nearly constant input has eigenvalues that are far below zero for their size."""


@final
@dataclass(frozen=True, eq=False)
class Importance:
    """Weights of the error of one layer; tr(R D C D^T) is what a difference D of its weight (rows, cols) costs.

    Args:
        cols: C, the second moment of the inputs E[x x^T] (cols, cols), or its diagonal (cols,). None: the identity.
        rows: R, the second moment of the gradients at the outputs (rows, rows), or a weight of each row (rows,): token
            frequencies of an embedding, Fisher information summed over each row. None: the identity.
        mean: E[x] (cols,), for the correction of the bias; fits do not read it.
        ridge: share of the mean of the diagonal that fits add to the diagonals of C and R.
        noise: the same for C alone: how far off, squared and relative, fits should expect the inputs to be, because
            layers before are compressed as well.

    Raises:
        ImportanceError: not finite, not symmetric, negative, or of another shape than a square matrix or a vector.
    """

    cols: Tensor | None = None
    rows: Tensor | None = None
    mean: Tensor | None = None
    ridge: float = RIDGE
    noise: float = 0.0
    _memory: "_Memory | None" = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, moment in (("cols", self.cols), ("rows", self.rows)):
            if moment is not None:
                _check_moment(name, moment)
        if self.mean is not None:
            _check_numbers("mean", self.mean, (1,))
        for name, share in (("ridge", self.ridge), ("noise", self.noise)):
            if not 0 <= share < math.inf:
                raise ImportanceError(f"{name} is a share of the mean of the diagonal, at least 0; got {share}")

    @property
    def is_identity(self) -> bool:
        """True if every entry of the weight counts alike."""
        return self.cols is None and self.rows is None

    def check(self, rows: int, cols: int) -> None:
        """Raise ImportanceError if this is not of a weight (rows, cols)."""
        for name, tensor, size in (("cols", self.cols, cols), ("rows", self.rows, rows), ("mean", self.mean, cols)):
            if tensor is not None and len(tensor) != size:
                raise ImportanceError(f"{name} is of {len(tensor)}, this weight of {rows} x {cols} needs {size}")

    def squared_norm(self, difference: Tensor) -> float:
        """tr(R D C D^T) of a difference D (rows, cols) of the weight, some rows at a time; 0 or more.

        Raises:
            ImportanceError: it is of another shape.
        """
        self.check(*difference.shape)
        return Metric(Moment(self.rows), Moment(self.cols), 1.0).squared_norm(difference)

    def of_rows(self, start: int, stop: int) -> "Importance":
        """What belongs to these rows of the weight alone; they must not be weighed together (no full R).

        Raises:
            ImportanceError: R is a full matrix.
        """
        if self.rows is not None and self.rows.dim() == 2:
            raise ImportanceError("a full second moment of the rows couples them; only a diagonal one can be cut")
        return replace(self, rows=None if self.rows is None else self.rows[start:stop])

    def centred(self) -> "Importance":
        """The same about the mean of the inputs, E[(x - mean)(x - mean)^T].

        It is the one to fit with where a bias takes up the mean error (`Fitted.bias_change`): what is left then is
        tr(R D (C - mean mean^T) D^T).

        Raises:
            ImportanceError: no mean, or no second moment of the inputs.
        """
        if self.mean is None or self.cols is None:
            missing = "mean" if self.mean is None else "cols"
            raise ImportanceError(f"{missing} is missing: centring takes the mean and the second moment of the inputs")
        cols, mean = self.cols.double(), self.mean.to(self.cols.device, torch.float64)
        if cols.dim() == 1:
            centred = (cols - mean.square()).clamp_min(0)
        else:
            centred = cols - torch.outer(mean, mean)
            centred.diagonal().clamp_min_(0)
            if float(centred.diagonal().sum()) < CANCELLED * float(cols.diagonal().sum()):
                values, vectors = torch.linalg.eigh(centred)
                centred = vectors * values.clamp_min(0) @ vectors.T
        return replace(self, cols=centred.to(self.cols.dtype))

    def remembering(self) -> "Importance":
        """The same, for several fits of one weight: it keeps its metric until `forget`."""
        copy = replace(self)
        object.__setattr__(copy, "_memory", _Memory())
        return copy

    def forget(self) -> None:
        """Give up what `remembering` keeps; it is computed again where it is needed."""
        if self._memory is not None:
            self._memory.metrics.clear()

    def metric(self, like: Tensor) -> Metric:
        """What fits work with, in float64 on the device of `like`; see Metric."""
        if self._memory is None:
            return self._metric(like, set())
        if like.device not in self._memory.metrics:
            self._memory.metrics[like.device] = self._metric(like, self._memory.sound)
        return self._memory.metrics[like.device]

    def _metric(self, like: Tensor, sound: set[str]) -> Metric:
        rows, row_scale = _damped(self.rows, self.ridge, like.device, "rows", sound)
        cols, col_scale = _damped(self.cols, self.ridge + self.noise, like.device, "cols", sound)
        return Metric(rows, cols, row_scale * col_scale)

    def row_metric(self, like: Tensor) -> Moment:
        """R of `metric` alone."""
        return _damped(self.rows, self.ridge, like.device, "rows", set())[0]


@final
class _Memory:
    """What a remembering importance keeps: its metrics, and which of its moments are positive definite once damped."""

    def __init__(self) -> None:
        self.metrics: dict[torch.device, Metric] = {}
        self.sound: set[str] = set()


def _damped(
    values: Tensor | None, ridge: float, device: torch.device, name: str, sound: set[str]
) -> tuple[Moment, float]:
    """A moment of mean 1 on its diagonal, plus the ridge, and what it was divided by.

    Args:
        sound: names of those that need no check; adds this one if it turns out so.
    """
    if values is None:
        return Moment(None), 1.0
    wide = values.detach().to(device, torch.float64)
    scale = float(wide.mean() if wide.dim() == 1 else wide.diagonal().mean())
    if scale == 0:
        return Moment(None), 0.0
    if wide.dim() == 1:
        return Moment(wide / scale + ridge), scale
    damped = (wide + wide.T) / (2 * scale)
    damped.diagonal().add_(ridge)
    if name in sound:
        return Moment(damped), scale
    if int(torch.linalg.cholesky_ex(damped).info):  # float32 sums leave eigenvalues below zero by more than the ridge
        values, vectors = Moment(damped).eigen
        damped = vectors * values.clamp_min(ridge) @ vectors.T
    else:
        sound.add(name)
    return Moment(damped), scale


def _check_moment(name: str, moment: Tensor) -> None:
    _check_numbers(name, moment, (1, 2))
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    if moment.dim() == 2:
        if moment.shape[0] != moment.shape[1]:
            raise ImportanceError(f"{name} has shape {tuple(moment.shape)}; a second moment is square")
        gap, largest = float((moment - moment.T).abs().max()), float(moment.abs().max())
        if gap > ASYMMETRY * largest:
            raise ImportanceError(f"{name} is not symmetric: values up to {largest:.2g} differ by up to {gap:.2g}")
    if float(diagonal.min()) < 0:
        at = int(diagonal.argmin())
        raise ImportanceError(f"{name} weighs entry {at} with {float(diagonal[at]):.2g}; weights are 0 or more")


def _check_numbers(name: str, tensor: Tensor, dims: tuple[int, ...]) -> None:
    if tensor.dim() not in dims or 0 in tensor.shape:
        wanted = "a vector" if dims == (1,) else "a square matrix or its diagonal"
        raise ImportanceError(f"{name} has shape {tuple(tensor.shape)}; {wanted} is needed")
    if not tensor.is_floating_point():
        raise ImportanceError(f"{name} is of {tensor.dtype}; real floating-point numbers are needed")
    if not torch.isfinite(tensor).all():
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise ImportanceError(f"{name} holds {nan} NaN and {inf} infinite values")
