"""Distances between tensors as sums over real tokens; losses are made of them. All in float32."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core import native_attention
from compresskit.distill.squares import DifferenceSquares, KnownGradients, ScoreSquares

MASKED = -1e4
"""Score of a pair that is none: exp of it is exactly 0, and differences of it stay finite."""


def token_squares(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum over real tokens of the mean squared difference.

    Args:
        student, teacher: (batch, time, width); no gradient goes to the teacher.
        mask: (batch, time) bool.
    """
    total: Tensor = DifferenceSquares.apply(student, teacher, mask[..., None])  # type: ignore[no-untyped-call]
    return total / student.shape[-1]


def score_squares(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], pairs: Tensor) -> Tensor:
    """Sum over real pairs of the squared difference of `scores`, mean over heads.

    Args:
        student, teacher: query and key of each, (batch, time, heads, size); no gradient goes to the teacher.
        pairs: (batch, 1, time, time) bool.
    """
    total: Tensor
    if found := native_attention.score_squares(*student, *teacher, pairs):
        total = KnownGradients.apply(*student, *found)  # type: ignore[no-untyped-call]
    else:
        total = ScoreSquares.apply(*student, *teacher, pairs)  # type: ignore[no-untyped-call]
    return total / student[0].shape[2]


def pair_squares(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Sum over real pairs of the squared difference, mean over heads.

    Args:
        student, teacher: (batch, heads, time, time).
        pairs: (batch, 1, time, time) bool.
    """
    difference = (student - teacher).masked_fill(~pairs, 0)
    return difference.square().sum() / difference.shape[1]


def scores(query: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, time, time) = query @ key / sqrt(size), before mask and softmax; Vaswani et al. 2017, eq. 1.

    Args:
        query, key: (batch, time, heads, size).
    """
    scale = 1 / math.sqrt(query.shape[-1])
    return (query.float() * scale).transpose(1, 2) @ key.float().permute(0, 2, 3, 1)


def row_divergence(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Sum over real queries of KL(softmax of teacher || softmax of student) over real keys in nats, mean over heads.

    Args:
        student, teacher: scores (batch, heads, time, time).
        pairs: (batch, 1, time, time) bool.
    """
    log_student = student.masked_fill(~pairs, MASKED).log_softmax(-1)
    log_teacher = teacher.masked_fill(~pairs, MASKED).log_softmax(-1)
    terms = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return terms.masked_fill(~pairs, 0).sum() / terms.shape[1]


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(teacher || student) in nats, summed over all but the last axis.

    Args:
        student, teacher: logits (..., classes).
        temperature: divides both; T^2 keeps the gradient's size (Hinton et al. 2015, section 2).
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 * cross-entropy of the student under the teacher's probabilities, in nats, summed over all but the last axis.

    The gradient is that of `divergence`; the value has the teacher's entropy besides.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    return -(temperature**2) * ((teacher.float() / temperature).softmax(-1) * log_student).sum()


def mask_places(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits over places (batch, time) in which padding is never chosen."""
    return logits.float().masked_fill(~mask, MASKED)


def place_squares(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of logits over real places, summed over examples: all (batch, time)."""
    squares = (student.float() - teacher.float()).square().masked_fill(~mask, 0)
    return (squares.sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def class_entropy(logits: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
    """Sum of the cross-entropy in nats over rows of logits (rows, classes) whose label (rows,) is not `ignored`."""
    return F.cross_entropy(logits.float(), labels.long(), ignore_index=ignored, reduction="sum")


def mean_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the last axis, summed over the others."""
    return (student.float() - teacher.float()).square().mean(-1).sum()


def mean_binary_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in nats, mean over the last axis, summed over the others; targets between 0 and 1."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(-1).sum()


def relations(states: Tensor, heads: int) -> Tensor:
    """(batch, heads, time, time): scores of states with themselves; MiniLM (Wang et al. 2020, eq. 7).

    Args:
        states: (batch, time, any, any); the last two axes together are cut into `heads` parts.
    """
    parts = torch.flatten(states, 2).unflatten(-1, (heads, -1))
    return scores(parts, parts)
