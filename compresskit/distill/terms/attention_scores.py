"""Attention scores before the softmax, built from captured queries and keys: no attention implementation gives them."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.loss import Comparison, LayerLoss, Tensors, check_heads, register, same_roles
from compresskit.distill.measures import score_squares


def _compare(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    query, key = student
    teacher_query, teacher_key = teacher
    return score_squares((query, key), (teacher_query, teacher_key), batch.pairs)


@register
@final
@dataclass(frozen=True, kw_only=True)
class AttentionScores(LayerLoss):
    """Mean squared difference of query @ key / sqrt(head size), per head and real pair, added up over the layers."""

    name: ClassVar[str] = "attention-scores"
    summary: ClassVar[str] = "mean squared difference of attention scores before the softmax"
    source: ClassVar[str] = "TinyBERT (Jiao et al. 2020), eq. 7; KroneckerBERT (Tahaei et al. 2022), eq. 14"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        for anatomy in (student, teacher):
            anatomy.check_scores()
        check_heads(self.name, student, teacher)
        pairs = same_roles(self.layer_pairs(student, teacher), "query", "key")
        return tuple(Comparison(ours, theirs, "pair", _compare) for ours, theirs in pairs)
