"""Sentence embeddings: the mean of the last hidden states over the real tokens of a text."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor
from torch.nn import functional as F

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.features import Feature
from compresskit.distill.loss import Comparison, Loss, Projected, Tensors, projection_sizes, register


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean (batch, hidden) of states (batch, time, hidden) over the real tokens, in float32."""
    weights = mask.unsqueeze(-1).float()  # (batch, time, 1)
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _cosine(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    """1 - cosine as half the squared distance of unit vectors, which is exactly 0 for equal ones."""
    ours, theirs = (F.normalize(_pooled(states[0], batch.mask), dim=-1) for states in (student, teacher))
    return (ours - theirs).square().sum() / 2


def _squares(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    ours, theirs = _pooled(student[0], batch.mask), _pooled(teacher[0], batch.mask)
    return (ours - theirs).square().mean(-1).sum()


@register
@final
@dataclass(frozen=True, kw_only=True)
class SentenceEmbeddings(Loss):
    """How far the mean-pooled embeddings of a text are apart, per example.

    Args:
        kind: cosine: 1 - cosine, from 0 to 2. mse: mean squared difference, which also asks for the length.
        projection: linear learns a map from the student's hidden size to the teacher's; needed where they differ.
    """

    name: ClassVar[str] = "sentence-embeddings"
    summary: ClassVar[str] = "1 - cosine, or mean squared difference, of mean-pooled last hidden states"
    source: ClassVar[str] = (
        "Reimers and Gurevych, EMNLP 2020, eq. 1 (mse); cosine is ours: it is what embeddings are for"
    )

    kind: Literal["cosine", "mse"] = "cosine"
    projection: Projected = "none"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        sizes = projection_sizes(self.name, self.projection, student, teacher)
        ours, theirs = ((Feature("hidden", anatomy.num_layers - 1),) for anatomy in (student, teacher))
        compare = _cosine if self.kind == "cosine" else _squares
        return (Comparison(ours, theirs, "example", compare, sizes),)
