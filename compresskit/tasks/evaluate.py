"""Running a model over the examples of a task and scoring what it says."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.errors import DataError
from compresskit.tasks.data import Examples, load_task_data
from compresskit.tasks.features import Features, collator, tokenized
from compresskit.tasks.labels import align_labels
from compresskit.tasks.metrics import Predictions, predictions_of, score
from compresskit.tasks.pretraining import PretrainingCollator
from compresskit.tasks.task import Task
from compresskit.tasks.words import predicts, word_scores

Array = np.ndarray
OnBatch = Callable[[int, int], None]
"""Called with the rows that are done and all rows."""


@final
@dataclass(frozen=True)
class Evaluation:
    """What `run_evaluation` found.

    Args:
        time_s: of the forward passes and their batches alone.
        predictions: of `predictions_of`, one for each example.
    """

    metrics: dict[str, float]
    num_examples: int
    time_s: float
    predictions: Predictions

    @property
    def examples_per_s(self) -> float:
        return self.num_examples / self.time_s


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    data: str | Path | Examples | None = None,
    *,
    split: str = "dev",
    batch_size: int = 32,
    max_length: int | None = None,
) -> dict[str, float]:
    """The metrics of a model on a split of a task, the primary one first; each at most 1.

    Args:
        model: as `model_for` returns it, dense or compressed, on any device; its mode is restored.
        data: a file, a folder, a hub id, None for the task's own, or examples of `load_task_data`.

    Raises:
        DataError: the data is not there, malformed, or does not fit the model's labels; or it has no such head.
    """
    found = run_evaluation(model, tokenizer, task, data, split=split, batch_size=batch_size, max_length=max_length)
    return found.metrics


def run_evaluation(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    data: str | Path | Examples | None = None,
    *,
    split: str = "dev",
    batch_size: int = 32,
    max_length: int | None = None,
    align: bool = True,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """`evaluate` with predictions, counts and times.

    Args:
        align: put the task's labels in the order of the model's names; false: both are in one order already.
    """
    if align:
        task = align_labels(task, getattr(model, "config", None))
    examples = data if isinstance(data, datasets.Dataset) else load_task_data(task, data, split)
    features = tokenized(examples, task, tokenizer, max_length=max_length)
    start = time.perf_counter()
    outputs = predict(model, tokenizer, task, features, batch_size=batch_size, on_batch=on_batch)
    time_s = time.perf_counter() - start
    predictions = predictions_of(task, outputs, features, examples)
    return Evaluation(score(task, predictions, examples), len(examples), time_s, predictions)


def predict(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    features: Features,
    *,
    batch_size: int = 32,
    on_batch: OnBatch | None = None,
) -> list[Array]:
    """The outputs of a model for each row of the features, in their order (shapes: see `metrics`).

    Rows of alike length share a batch, the longest first: what does not fit into memory fails at once. Of language
    modelling, which needs the probabilities of all words at each place, a batch has at most `BATCH_TOKENS` tokens.

    Raises:
        DataError: an output is not finite, or the model has no head for this kind of task.
    """
    collate: Any = collator(tokenizer)
    wanted = list(_INPUTS)
    if task.kind == "language-modelling":
        wanted.append("labels")
        batch_size = max(1, min(batch_size, BATCH_TOKENS // max(features["length"])))
        if predicts(model) == "masked":
            collate = PretrainingCollator(collate)
    inputs = features.select_columns([n for n in features.column_names if n in wanted])
    order = np.argsort(-np.asarray(features["length"]), kind="stable")
    device = next(model.parameters()).device
    outputs: list[Array | None] = [None] * len(order)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            columns = inputs[chosen.tolist()]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
            for index, output in zip(chosen, _outputs(model, task, batch), strict=True):
                outputs[index] = output
            if on_batch is not None:
                on_batch(start + len(chosen), len(order))
    return [output for output in outputs if output is not None]


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCH_TOKENS = 4096
"""Of language modelling: with 50,000 words their probabilities are 0.8 GB then."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _outputs(model: nn.Module, task: Task, batch: dict[str, Tensor]) -> Iterator[Array]:
    labels = batch.pop("labels", None)
    found = model(**batch)
    if task.kind == "language-modelling":
        words = predicts(model)
        if words is None or labels is None:
            raise DataError(
                f"{type(model).__name__} predicts no words, by which {task.name} is scored: causal and masked language "
                "models do"
            )
        for scores in word_scores(found, labels, words):
            yield _finite(scores)
        return
    tensors: list[Tensor] = []
    for name in _ANSWERS.get(task.kind, ("logits",)):
        if getattr(found, name, None) is None:
            raise DataError(
                f"{type(model).__name__} answers without {name}, by which {task.name} ({task.kind}) is scored: "
                "it has no head for it"
            )
        tensors.append(found[name])
    mask = batch["attention_mask"]
    if task.kind == "similarity":
        yield from _finite(pooled(tensors[0], mask))
        return
    if task.kind == "question-answering":
        logits = torch.stack(tensors, dim=1)  # (batch, 2, time)
        for row, length in zip(_finite(logits), mask.sum(1).tolist(), strict=True):
            yield row[:, :length]
        return
    for row, length in zip(_finite(tensors[0]), mask.sum(1).tolist(), strict=True):
        yield row[:length] if task.kind == "token-classification" else row


_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "similarity": ("last_hidden_state",),
    "question-answering": ("start_logits", "end_logits"),
}
"""What of a model's output a kind of task goes by, where that is not its logits."""


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Embeddings (batch, dim) of unit length: the mean of hidden states (batch, time, dim) where the mask is 1."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _finite(tensor: Tensor) -> Array:
    if not bool(tensor.isfinite().all()):
        raise DataError("the model's output holds NaN or infinity; its weights are damaged, or its dtype is too narrow")
    return tensor.float().cpu().numpy()
