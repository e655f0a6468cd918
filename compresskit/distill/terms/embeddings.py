"""Embedding output: what the first layer gets."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.features import Feature
from compresskit.distill.loss import Comparison, Loss, Projected, Tensors, projection_sizes, register
from compresskit.distill.measures import token_squares


def compare_states(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    """Squared difference of one tensor (batch, time, hidden) of each."""
    return token_squares(student[0], teacher[0], batch.mask)


@register
@final
@dataclass(frozen=True, kw_only=True)
class Embeddings(Loss):
    """Mean squared difference of the embedding output, per real token.

    Args:
        projection: linear learns a map from the student's hidden size to the teacher's; needed where they differ.
    """

    name: ClassVar[str] = "embeddings"
    summary: ClassVar[str] = "mean squared difference of what the first layer gets"
    source: ClassVar[str] = "TinyBERT (Jiao et al. 2020), eq. 9; KroneckerBERT (Tahaei et al. 2022), eq. 14"

    projection: Projected = "none"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        feature = (Feature("embeddings"),)
        sizes = projection_sizes(self.name, self.projection, student, teacher)
        return (Comparison(feature, feature, "token", compare_states, sizes),)
