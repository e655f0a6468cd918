"""Exact match and F1 of answers, by the rules of the official SQuAD evaluation.

Source: Rajpurkar et al., EMNLP 2016, section 6.1: lower case, without punctuation, without a, an, the, and blanks
made one; the best over all reference answers counts. For questions without an answer, Rajpurkar et al., ACL 2018:
the empty answer is right, any other wrong.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """What of an answer is compared."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0; no reference: the empty answer is right."""
    return float(normalized(answer) in {normalized(reference) for reference in references or ("",)})


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words of the answer, the best over the references."""
    return max(_overlap(normalized(answer).split(), normalized(r).split()) for r in references or ("",))


def _overlap(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    common = (Counter(words) & Counter(reference)).total()
    return 2 * common / (len(words) + len(reference))


@final
@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Args:
        text: the best span.
        null_margin: score of no answer minus that of the best span; no answer is given where it exceeds a threshold.
    """

    text: str
    null_margin: float

    def given(self, threshold: float) -> str:
        """The answer at a threshold, the empty one for none."""
        return "" if self.null_margin > threshold else self.text


def squad_scores(
    answers: Sequence[Answer], references: Sequence[Sequence[str]], *, unanswerable: bool
) -> dict[str, float]:
    """Means of exact match and F1 over all questions.

    Args:
        references: for each question; no text: it has no answer.
        unanswerable: texts that are empty after normalisation do not count; no answer is given where that scores
            higher than any span (threshold 0). Adds both scores on the questions with and without an answer, and the
            best F1 that any threshold would reach.
    """
    wanted = [[text for text in texts if normalized(text) or not unanswerable] for texts in references]
    given = [answer.given(0.0) if unanswerable else answer.text for answer in answers]
    exact = [exact_match(text, texts) for text, texts in zip(given, wanted, strict=True)]
    f1 = [answer_f1(text, texts) for text, texts in zip(given, wanted, strict=True)]
    scores = {"exact_match": _mean(exact), "answer_f1": _mean(f1)}
    if unanswerable:
        for name, has in (("has_answer", True), ("no_answer", False)):
            chosen = [i for i, texts in enumerate(wanted) if bool(texts) == has]
            if chosen:
                scores[f"exact_match_{name}"] = _mean([exact[i] for i in chosen])
                scores[f"answer_f1_{name}"] = _mean([f1[i] for i in chosen])
        scores["best_answer_f1"], scores["best_threshold"] = best_threshold(answers, wanted)
    return scores


def best_threshold(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """The highest mean F1 over all thresholds for no answer, and that threshold."""
    total = float(sum(not texts for texts in references))  # no answer to any question
    margins = [answer.null_margin for answer in answers]
    best, threshold = total, min(margins) - 1.0
    order = sorted(range(len(answers)), key=margins.__getitem__)
    for position, i in enumerate(order):
        text, texts = answers[i].text, references[i]
        total += answer_f1(text, texts) if texts else -float(bool(normalized(text)))
        last = position + 1 == len(order) or margins[order[position + 1]] > margins[i]
        if last and total > best:
            best, threshold = total, margins[i]
    return best / len(answers), threshold


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
