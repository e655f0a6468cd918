"""From start and end scores of windows to one answer for each question.

Source: Devlin et al., NAACL 2019, sections 4.2 and 4.3: the score of a span is start + end, that of no answer the
same at the classifier token; over windows the best span and the least score of no answer count.
"""

import numpy as np

from compresskit.tasks.data import Examples
from compresskit.tasks.features import Features
from compresskit.tasks.squad import Answer

BEST, MAX_TOKENS = 20, 30
"""Starts and ends that are combined in a window, and the tokens of an answer at most, as in BERT's SQuAD runs."""

Array = np.ndarray


def answers_of(scores: list[Array], features: Features, examples: Examples) -> list[Answer]:
    """The best answer to every question.

    Args:
        scores: for each window (2, time): start and end.
    """
    best: dict[int, tuple[float, int, int]] = {}
    null: dict[int, float] = {}
    for window, example, offsets in zip(scores, features["example"], features["offsets"], strict=True):
        null[example] = min(null.get(example, np.inf), float(window[0, 0] + window[1, 0]))
        span = best_span(window, np.asarray(offsets))
        if span is not None and (example not in best or span[0] > best[example][0]):
            best[example] = span
    contexts = examples["context"]
    return [_answer(best.get(i), null[i], contexts[i]) for i in range(len(examples))]


def best_span(scores: Array, offsets: Array) -> tuple[float, int, int] | None:
    """Score, first character and last + 1 of the best span of a window, None if the window has no context.

    Args:
        scores: (2, time).
        offsets: (time, 2), characters of each token, -1 outside the context.
    """
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside):
        return None
    starts, ends = (inside[np.argsort(-scores[side, inside], kind="stable")[:BEST]] for side in (0, 1))
    length = ends[None, :] - starts[:, None] + 1  # (starts, ends)
    total = scores[0, starts][:, None] + scores[1, ends][None, :]
    total = np.where((length >= 1) & (length <= MAX_TOKENS), total, -np.inf)
    row, column = np.unravel_index(np.argmax(total), total.shape)
    if total[row, column] == -np.inf:
        return None
    return float(total[row, column]), int(offsets[starts[row], 0]), int(offsets[ends[column], 1])


def _answer(span: tuple[float, int, int] | None, null: float, context: str) -> Answer:
    if span is None:
        return Answer("", np.inf)
    score, start, end = span
    return Answer(context[start:end], null - score)
