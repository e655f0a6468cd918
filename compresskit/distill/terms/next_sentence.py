"""Next-sentence prediction, the second half of BERT's pre-training."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import IGNORED, Batch
from compresskit.distill.features import Feature
from compresskit.distill.loss import Comparison, Loss, Tensors, register
from compresskit.distill.measures import class_entropy
from compresskit.errors import DistillError


def _compare(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    return class_entropy(student[0], batch.label("next_sentence_label").view(-1), ignored=IGNORED)


@register
@final
@dataclass(frozen=True, kw_only=True)
class NextSentence(Loss):
    """Cross-entropy of whether the second text follows the first, per example; needs a BertForPreTraining student."""

    name: ClassVar[str] = "next-sentence"
    summary: ClassVar[str] = "cross-entropy of BERT's next-sentence prediction"
    source: ClassVar[str] = "BERT (Devlin et al. 2019), section 3.1; in stage 1 of KroneckerBERT (Tahaei et al. 2022)"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        if student.task != "pretraining":
            raise DistillError(f"{self.name}: only BertForPreTraining has this head; the student is a {student.task}")
        return (Comparison((Feature("next-sentence"),), (), "example", _compare),)
