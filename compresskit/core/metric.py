"""Moments and metrics: symmetric positive semi-definite matrices that weigh the rows and columns of a difference.

`importance.py` says which they are; fits work with these.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from compresskit.errors import ImportanceError

ASYMMETRY = 1e-3
"""Tolerated difference between a second moment and its transpose, and negative eigenvalues, as shares of its largest
value: what summing in half precision or float32 leaves."""
CHUNK_ROWS = 1024
"""Rows of a difference that are weighted at a time."""


@final
@dataclass(frozen=True, eq=False)
class Moment:
    """A symmetric positive semi-definite matrix: None is the identity, a vector its diagonal."""

    values: Tensor | None

    @classmethod
    def of(cls, values: Tensor | None, *, like: Tensor) -> "Moment":
        """With the dtype and on the device of `like`."""
        return cls(None if values is None else values.to(like.device, like.dtype))

    @property
    def is_identity(self) -> bool:
        return self.values is None

    def dense(self, n: int, *, like: Tensor) -> Tensor:
        """The matrix (n, n), with the dtype and on the device of `like`."""
        if self.values is None:
            return torch.eye(n, dtype=like.dtype, device=like.device)
        values = self.values.to(like.device, like.dtype)
        return values.diag() if values.dim() == 1 else values

    def after(self, matrix: Tensor) -> Tensor:
        """matrix @ self."""
        if self.values is None:
            return matrix
        return matrix * self.values if self.values.dim() == 1 else matrix @ self.values

    def before(self, matrix: Tensor) -> Tensor:
        """self @ matrix."""
        return self.rows_before(slice(None), matrix)

    def rows_before(self, part: slice, matrix: Tensor) -> Tensor:
        """Some rows of self @ matrix."""
        if self.values is None:
            return matrix[part]
        return self.values[part, None] * matrix[part] if self.values.dim() == 1 else self.values[part] @ matrix

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, the largest last, and eigenvectors of a full one.

        Raises:
            ImportanceError: it has an eigenvalue too far below zero to be rounding.
        """
        assert self.values is not None
        values, vectors = torch.linalg.eigh(self.values)
        least, largest = float(values[0]), float(values[-1])
        if least < -ASYMMETRY * largest:
            raise ImportanceError(
                f"a second moment is positive semi-definite; this one has eigenvalues from {least:.2g} to {largest:.2g}"
            )
        return values, vectors

    def factor(self) -> Tensor:
        """F (n, n) with F F^T = self, a full one; a Cholesky factor takes a tenth of the time of the root."""
        assert self.values is not None
        factor, info = torch.linalg.cholesky_ex(self.values)
        root = self.root().values if int(info) else factor
        assert root is not None
        return root

    def whitened(self, matrix: Tensor) -> Tensor:
        """S (rows, n) with S S^T = matrix @ self @ matrix^T."""
        if self.values is None or self.values.dim() == 1:
            return self.root().after(matrix)
        return matrix @ self.factor()

    def root(self) -> "Moment":
        """The symmetric square root."""
        return self._power(0.5)

    def inverse_root(self) -> "Moment":
        """The symmetric square root of the pseudo-inverse."""
        return self._power(-0.5)

    def _power(self, exponent: float) -> "Moment":
        if self.values is None:
            return self
        if self.values.dim() == 1:
            return Moment(_powers(self.values, exponent))
        values, vectors = self.eigen
        return Moment(vectors * _powers(values, exponent) @ vectors.T)


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """R and C damped, in float64, each of mean 1 on its diagonal before: what fits work with.

    tr(R D C D^T) <= scale * tr(rows D cols D^T), up to the ridge they are equal. A moment that is zero everywhere says
    nothing and counts as the identity here, with scale 0.
    """

    rows: Moment
    cols: Moment
    scale: float
    _answers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _grams: dict[int, tuple[Tensor, Moment]] = field(default_factory=dict, init=False, repr=False)

    def answers(self, weight: Tensor) -> Tensor:
        """W cols (rows, cols) in float64; computed once for a weight, and kept with this metric."""
        if self.cols.is_identity:
            return weight.double()
        if id(weight) not in self._answers:
            self._answers[id(weight)] = weight, self.cols.after(weight.double())
        return self._answers[id(weight)][1]

    def gram(self, weight: Tensor) -> Moment:
        """W cols W^T (rows, rows), likewise, with its eigenvalues once they are asked for."""
        if id(weight) not in self._grams:
            self._grams[id(weight)] = weight, Moment(self.answers(weight) @ weight.double().T)
        return self._grams[id(weight)][1]

    def squared_norm(self, difference: Tensor) -> float:
        """scale * tr(rows D cols D^T), 0 or more: products in the dtype of D, added up in float64, in pieces."""
        rows, cols = (Moment.of(moment.values, like=difference) for moment in (self.rows, self.cols))
        total = 0.0
        for start in range(0, len(difference), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            total += float((cols.after(difference[part]) * rows.rows_before(part, difference)).double().sum())
        return self.scale * max(total, 0.0)

    def without_rows(self) -> "Metric":
        """The same of a weight that has taken R in."""
        return Metric(Moment(None), self.cols, self.scale)


def _powers(values: Tensor, exponent: float) -> Tensor:
    """Each positive value to the power; values that are rounding noise to 0."""
    floor = float(values.max()) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values.clamp_min(floor or 1.0).pow(exponent), 0.0)
