"""From the outputs of a model to the metrics of a task, offline: scikit-learn, scipy, and our entities and answers.

Outputs are one array for each row of the features, in float32: (labels,) for classification, (1,) for regression,
(time, labels) for token classification, (2, time) for question answering, (dim,) of unit length for similarity, and for
language modelling (3,): the words' log-likelihood in nats, how many of them are right, and how many there are.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
import sklearn.metrics

from compresskit.tasks.data import Examples
from compresskit.tasks.entities import entity_scores
from compresskit.tasks.features import IGNORED, Features
from compresskit.tasks.spans import answers_of
from compresskit.tasks.squad import squad_scores
from compresskit.tasks.task import Task

Array = np.ndarray
Predictions = Any
"""For each example: label numbers (array), numbers (array), lists of tags, `Answer`s, cosines (array).

Of language modelling, outputs (windows, 3) as they are."""


def predictions_of(task: Task, outputs: list[Array], features: Features, examples: Examples) -> Predictions:
    """What the model says of each example, in the order of the examples."""
    if task.kind == "classification":
        return np.array([output.argmax() for output in outputs])
    if task.kind == "regression":
        return np.array([output.item() for output in outputs])
    if task.kind == "similarity":
        return _cosines(outputs, features, len(examples))
    if task.kind == "language-modelling":
        return np.stack(outputs).astype(np.float64)
    if task.kind == "token-classification":
        return _tags(task, outputs, features, examples)
    return answers_of(outputs, features, examples)


def score(task: Task, predictions: Predictions, examples: Examples) -> dict[str, float]:
    """The metrics of a task, its primary one first; a correlation with a constant is 0.

    Args:
        predictions: of `predictions_of`.
    """
    if task.kind == "question-answering":
        found = squad_scores(predictions, examples["answer_texts"], unanswerable=task.unanswerable)
        return {**{name: found[name] for name in task.metrics}, **found}
    if task.kind == "language-modelling":
        found = _word_scores(predictions)
    elif task.kind == "token-classification":
        names = task.label_names
        expected = [[names[tag] for tag in tags] for tags in examples["tags"]]
        found = _tag_scores(predictions, expected)
    else:
        labels = np.asarray(examples["label"])
        found = {name: _METRICS[name](labels, predictions) for name in task.metrics}
    return {name: float(found[name]) for name in task.metrics}


def agreement(task: Task, mine: Predictions, theirs: Predictions) -> dict[str, float]:
    """How far two models say the same of the same examples, whatever the labels are."""
    if task.kind == "classification":
        return {"same_predictions": float(np.mean(mine == theirs))}
    if task.kind == "question-answering":
        threshold = 0.0 if task.unanswerable else np.inf
        same = [a.given(threshold) == b.given(threshold) for a, b in zip(mine, theirs, strict=True)]
        return {"same_predictions": float(np.mean(same))}
    if task.kind == "token-classification":
        same = [a == b for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        return {"same_predictions": float(np.mean(same))}
    if task.kind == "language-modelling":
        differences = (mine[:, 0] - theirs[:, 0]) / mine[:, 2]  # nats a word, in each window
        return {"mean_difference": float(np.average(np.abs(differences), weights=mine[:, 2]))}
    return {"spearman": _spearman(theirs, mine), "mean_difference": float(np.mean(np.abs(mine - theirs)))}


def _cosines(outputs: list[Array], features: Features, count: int) -> Array:
    dim = len(outputs[0])
    both = np.zeros((2, count, dim), dtype=np.float32)
    for output, side, example in zip(outputs, features["side"], features["example"], strict=True):
        both[side, example] = output
    cosines: Array = (both[0] * both[1]).sum(-1)
    return cosines


def _tags(task: Task, outputs: list[Array], features: Features, examples: Examples) -> list[list[str]]:
    """The tag of each word from its first piece; words that were cut off are outside of any entity."""
    tags = [["O"] * len(tokens) for tokens in examples["tokens"]]
    for output, labels, example in zip(outputs, features["labels"], features["example"], strict=True):
        first = np.asarray(labels) != IGNORED
        for word, tag in enumerate(output[first].argmax(-1)):
            tags[example][word] = task.label_names[tag]
    return tags


def _word_scores(outputs: Array) -> dict[str, float]:
    """Over all words of all windows alike."""
    total, right, count = outputs.sum(0)
    mean = total / count
    return {"log_likelihood": mean, "perplexity": float(np.exp(min(-mean, 700.0))), "word_accuracy": right / count}


def _tag_scores(predicted: Sequence[list[str]], expected: Sequence[list[str]]) -> dict[str, float]:
    precision, recall, f1 = entity_scores(predicted, expected)
    same = [a == b for x, y in zip(predicted, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "entity_precision": precision,
        "entity_recall": recall,
        "entity_f1": f1,
        "token_accuracy": float(np.mean(same)),
    }


def _correlation(function: Any, labels: Array, predictions: Array) -> float:
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)


def _spearman(labels: Array, predictions: Array) -> float:
    return _correlation(scipy.stats.spearmanr, labels, predictions)


def _pearson(labels: Array, predictions: Array) -> float:
    return _correlation(scipy.stats.pearsonr, labels, predictions)


def _mcc(labels: Array, predictions: Array) -> float:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found", category=UserWarning)
        return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


_METRICS: dict[str, Any] = {
    "accuracy": lambda labels, predictions: np.mean(labels == predictions),
    "f1": lambda labels, predictions: sklearn.metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0),
    "macro_f1": lambda labels, predictions: sklearn.metrics.f1_score(
        labels, predictions, average="macro", zero_division=0.0
    ),
    "mcc": _mcc,
    "pearson": _pearson,
    "spearman": _spearman,
}
