"""The task itself: the student's logits against the labels, computed here so that padding and batches never matter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn import functional as F

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import IGNORED, NO_NUMBER, Batch, Unit
from compresskit.distill.features import Feature
from compresskit.distill.loss import Comparison, Loss, Tensors, register
from compresskit.distill.measures import class_entropy, mask_places, mean_binary_entropy
from compresskit.errors import DistillError


@register
@final
@dataclass(frozen=True, kw_only=True)
class Task(Loss):
    """What the student's head is trained on: the loss that transformers computes for it, with our averaging.

    Cross-entropy per example (classification) or per labelled token (tokens, masked and causal language models), mean
    squared error per example (regression), mean binary cross-entropy (several labels), mean of the cross-entropies of
    start and end over real places (question answering).
    """

    name: ClassVar[str] = "task"
    summary: ClassVar[str] = "the student's own loss on the labels"
    source: ClassVar[str] = "KroneckerBERT (Tahaei et al. 2022), eq. 14, L_Student; Hinton et al. 2015, section 2"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        task = student.head()
        if task == "question-answering":
            return (_against_labels("start", "example", _start), _against_labels("end", "example", _end))
        unit: Unit = "example" if task in _EXAMPLES else "label"
        return (_against_labels("logits", unit, _EXAMPLES.get(task, _tokens)),)


def _against_labels(role: str, unit: Unit, compare: Callable[[Tensors, Tensors, Batch], Tensor]) -> Comparison:
    return Comparison((Feature(role),), (), unit, compare)  # type: ignore[arg-type]


def _sequence(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    labels = batch.label().view(-1)
    _check_range(labels, student[0].shape[-1])
    return class_entropy(student[0], labels, ignored=IGNORED)


def _regression(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    found, labels = student[0].float().view(-1), batch.label().float().view(-1)
    known = labels != NO_NUMBER
    return F.mse_loss(found[known], labels[known], reduction="sum")


def _multi_label(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    return mean_binary_entropy(student[0], batch.label())


def _tokens(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    rows = batch.labelled
    labels = batch.token_labels()[rows]
    _check_range(labels, student[0].shape[-1])
    return class_entropy(student[0][rows], labels, ignored=IGNORED)


def _start(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    return _place(student[0], batch, "start_positions")


def _end(student: Tensors, _: Tensors, batch: Batch) -> Tensor:
    return _place(student[0], batch, "end_positions")


def _place(logits: Tensor, batch: Batch, name: str) -> Tensor:
    """Half the cross-entropy over real places; answers outside the text are ignored, as in transformers."""
    length = logits.shape[1]
    places = batch.label(name).view(-1)
    outside = (places < 0) | (places >= length)
    return class_entropy(mask_places(logits, batch.mask), places.masked_fill(outside, IGNORED), ignored=IGNORED) / 2


def _check_range(labels: Tensor, classes: int) -> None:
    """Labels that the head has no logits for are an error of the data; CUDA would only say that an assertion failed."""
    if labels.numel() and (int(labels.max()) >= classes or (int(labels.min()) < 0 and int(labels.min()) != IGNORED)):
        raise DistillError(
            f"task: the labels go from {int(labels.min())} to {int(labels.max())}, the student has {classes} classes"
        )


_EXAMPLES: Mapping[str, Callable[[Tensors, Tensors, Batch], Tensor]] = {
    "sequence": _sequence,
    "regression": _regression,
    "multi-label": _multi_label,
}
