"""Language modelling: which words a model predicts, and how well."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.distill.anatomy import Anatomy
from compresskit.tasks.features import IGNORED

Words = Literal["next", "masked"]
HEADS: Mapping[str | None, Words] = {"causal-lm": "next", "masked-lm": "masked", "pretraining": "masked"}
"""By what the distillation engine calls a model's head."""


def predicts(model: Any) -> Words | None:
    """Which words a model predicts; None: it has no head for them."""
    return HEADS.get(Anatomy(model, "model").task) if isinstance(model, PreTrainedModel) else None


def word_scores(outputs: Any, labels: Tensor, words: Words) -> Iterator[Tensor]:
    """For each row (3,): the log-likelihood of its words in nats, how many the model has right, how many there are.

    Row by row, because the probabilities of all words at each place are large.

    Args:
        outputs: what the model returns.
        labels: (batch, time), `IGNORED` where there is nothing to predict.
    """
    logits = outputs["prediction_logits"] if "prediction_logits" in outputs else outputs["logits"]
    if words == "next":
        logits, labels = logits[:, :-1], labels[:, 1:]
    for row, expected in zip(logits, labels, strict=True):
        there = expected != IGNORED
        scores, expected = row[there].float(), expected[there]
        likelihood = -F.cross_entropy(scores, expected, reduction="sum")
        right, count = (scores.argmax(-1) == expected).sum(), there.sum()
        yield torch.stack([likelihood, right.float(), count.float()])
