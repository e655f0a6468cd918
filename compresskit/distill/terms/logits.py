"""Logits: the teacher's answers as targets."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch, Unit
from compresskit.distill.features import Feature
from compresskit.distill.loss import Comparison, Loss, Tensors, register
from compresskit.distill.measures import (
    divergence,
    mask_places,
    mean_binary_entropy,
    mean_squares,
    place_squares,
    soft_cross_entropy,
)
from compresskit.errors import DistillError, OptionError

Measure = Callable[[Tensor, Tensor], Tensor]


@register
@final
@dataclass(frozen=True, kw_only=True)
class Logits(Loss):
    """How far the student's logits are from the teacher's, per example, or per token where each token has logits.

    Args:
        kind: kl: T^2 KL(teacher || student) in nats. cross-entropy: the same gradient; the value has the teacher's
            entropy besides. mse: mean squared difference over the classes. auto: mse for regression, else kl.
            With several labels per example, kl and cross-entropy are both the mean binary cross-entropy.
        temperature: T, divides the logits of both; only for kl and cross-entropy.
        places: where tokens have logits: all real tokens, or those with a label only (the masked ones of a masked
            language model).
    """

    name: ClassVar[str] = "logits"
    summary: ClassVar[str] = "KL divergence, cross-entropy or mean squared difference of logits"
    source: ClassVar[str] = "Hinton et al. 2015, section 2"

    kind: Literal["auto", "kl", "cross-entropy", "mse"] = "auto"
    temperature: float = 1.0
    places: Literal["all", "labelled"] = "all"

    def __post_init__(self) -> None:
        Loss.__post_init__(self)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise OptionError(f"the temperature of {self.name} is a positive number, got {self.temperature}")

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        task = student.head()
        if teacher.head() != task:
            raise DistillError(f"{self.name}: the student's head is for {task}, the teacher's for {teacher.head()}")
        if task in ("masked-lm", "causal-lm", "pretraining"):
            _check_same(self.name, "words", student.vocab_size, teacher.vocab_size)
        elif task != "question-answering":
            _check_same(self.name, "labels", student.num_labels, teacher.num_labels)
        measure = self._measure(task)
        if task == "question-answering":
            return tuple(
                Comparison((Feature(role),), (Feature(role),), "example", _places(measure)) for role in ("start", "end")
            )
        feature = (Feature("logits"),)
        if task in ("sequence", "regression", "multi-label"):
            return (Comparison(feature, feature, "example", _examples(measure)),)
        unit: Unit = "label" if self.places == "labelled" else "token"
        return (Comparison(feature, feature, unit, _tokens(measure, labelled=unit == "label")),)

    def _measure(self, task: str) -> Measure:
        if task == "regression" and self.kind in ("kl", "cross-entropy"):
            raise DistillError(f"{self.name}: regression has no probabilities for {self.kind}; use kind=mse")
        if self.kind == "mse" or task == "regression":
            return mean_squares
        if task == "multi-label":
            return lambda s, t: (
                self.temperature**2
                * mean_binary_entropy(s.float() / self.temperature, (t.float() / self.temperature).sigmoid())
            )
        if self.kind == "cross-entropy":
            return lambda s, t: soft_cross_entropy(s, t, temperature=self.temperature)
        return lambda s, t: divergence(s, t, temperature=self.temperature)


def _check_same(name: str, what: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise DistillError(f"{name}: the student has {ours} {what}, the teacher {theirs}; logits pair up one by one")


def _examples(measure: Measure) -> Callable[[Tensors, Tensors, Batch], Tensor]:
    """Logits (batch, classes)."""
    return lambda student, teacher, batch: measure(student[0], teacher[0])


def _tokens(measure: Measure, *, labelled: bool) -> Callable[[Tensors, Tensors, Batch], Tensor]:
    """Logits (batch, time, classes), of which only the rows that count are used."""

    def compare(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
        rows = batch.labelled if labelled else batch.mask
        return measure(student[0][rows], teacher[0][rows])

    return compare


def _places(measure: Measure) -> Callable[[Tensors, Tensors, Batch], Tensor]:
    """Logits over places (batch, time), real ones only; half, because an answer has a start and an end."""
    if measure is mean_squares:
        return lambda student, teacher, batch: place_squares(student[0], teacher[0], batch.mask) / 2
    return lambda student, teacher, batch: (
        measure(mask_places(student[0], batch.mask), mask_places(teacher[0], batch.mask)) / 2
    )
