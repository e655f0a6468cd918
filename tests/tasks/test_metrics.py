"""Metrics against values that are known or counted another way."""

import itertools
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compresskit.tasks as tasks
from compresskit.tasks.entities import entities, entity_scores
from compresskit.tasks.spans import BEST, MAX_TOKENS, best_span
from compresskit.tasks.squad import Answer, answer_f1, best_threshold, exact_match, normalized, squad_scores
from compresskit.tasks.task import METRICS_OF

LABELS = np.array([1, 1, 1, 0, 0, 1])
PREDICTED = np.array([1, 1, 0, 0, 1, 1])  # 3 true positives, 1 true negative, 1 false of each


def scores(kind: str, predictions: Any, labels: Any) -> dict[str, float]:
    columns = ("a", "b") if kind == "similarity" else ("a",)
    task = tasks.custom_task(kind, columns, metrics=METRICS_OF[kind])  # type: ignore[arg-type]
    return tasks.score(task, predictions, datasets.Dataset.from_dict({"label": list(labels)}))


def test_classification() -> None:
    found = scores("classification", PREDICTED, LABELS)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["macro_f1"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["mcc"] == pytest.approx((3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5)


@pytest.mark.filterwarnings("error")
def test_a_model_that_always_says_the_same_has_no_correlation() -> None:
    assert scores("classification", np.zeros(6, int), LABELS)["mcc"] == 0
    assert scores("classification", np.zeros(6, int), LABELS)["f1"] == 0
    assert scores("regression", np.ones(6), np.arange(6.0)) == {"pearson": 0, "spearman": 0}


def test_correlations() -> None:
    found = scores("regression", np.array([1.0, 2.0, 30.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 30, 4], [1, 2, 3, 4])[0, 1])
    assert scores("similarity", np.array([0.1, 0.9]), np.array([0.0, 5.0]))["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER", {("PER", 0, 2)}),
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-LOC O", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("O I-PER O I-PER", {("PER", 1, 2), ("PER", 3, 4)}),
        ("S-PER B-LOC I-LOC E-LOC S-LOC", {("PER", 0, 1), ("LOC", 1, 4), ("LOC", 4, 5)}),
        ("I-PER E-PER I-PER", {("PER", 0, 2), ("PER", 2, 3)}),
        ("verb verb O noun", {("verb", 0, 2), ("noun", 3, 4)}),
        ("O O", set()),
    ],
)
def test_entities_of_every_scheme(tags: str, found: set) -> None:
    assert entities(tags.split()) == found


def test_an_entity_is_right_if_type_and_both_ends_are() -> None:
    expected = [["B-PER", "I-PER", "O"], ["B-LOC"]]
    assert entity_scores(expected, expected) == (1, 1, 1)
    assert entity_scores([["B-PER", "O", "O"], ["B-LOC"]], expected) == (0.5, 0.5, 0.5)
    assert entity_scores([["B-ORG", "I-ORG", "O"], ["O"]], expected) == (0, 0, 0)
    assert entity_scores([["B-PER", "I-PER", "B-PER"], ["O"]], expected) == (0.5, 0.5, 0.5)
    assert entity_scores([["O"]], [["O"]]) == (0, 0, 0)


def test_answers_are_compared_by_the_official_rules() -> None:
    assert normalized("The  Cat's  an-imal, a dog.") == "cats animal dog"
    assert exact_match("the Eiffel Tower!", ["Louvre", "Eiffel tower"]) == 1
    assert exact_match("theory", ["ory"]) == 0
    assert answer_f1("in the old town of Rome", ["Rome", "old Rome"]) == pytest.approx(2 * 2 / (5 + 2))
    assert answer_f1("Rome Rome", ["Rome"]) == pytest.approx(2 * 1 / (2 + 1))
    assert (answer_f1("x", ["y"]), answer_f1("", []), answer_f1("x", []), exact_match("", [])) == (0, 1, 0, 1)


def test_unanswerable_questions_are_split_off() -> None:
    answers = [Answer("rome", -3.0), Answer("paris", -2.0), Answer("x", -1.0), Answer("y", 5.0)]
    references = [["Rome"], ["the city of Paris"], [], []]
    found = squad_scores(answers, references, unanswerable=True)
    assert found["exact_match"] == 2 / 4
    assert found["answer_f1_has_answer"] == pytest.approx((1 + 2 / 4) / 2)
    assert found["exact_match_no_answer"] == 1 / 2
    assert (found["best_answer_f1"], found["best_threshold"]) == (pytest.approx((1 + 0.5 + 2) / 4), -2.0)
    plain = squad_scores([Answer("rome", 9.0)], [["Rome"]], unanswerable=False)
    assert plain == {"exact_match": 1, "answer_f1": 1}


ASKED = st.tuples(st.sampled_from(["rome", "old rome", "paris", ""]), st.integers(-3, 3), st.sampled_from([0, 1, 2]))


@given(st.lists(ASKED, min_size=1, max_size=8))
def test_the_best_threshold_is_the_best_of_all(asked: list[tuple[str, int, int]]) -> None:
    answers = [Answer(text, float(margin)) for text, margin, _ in asked]
    references = [["rome", "paris"][:count] for _, _, count in asked]

    def mean(threshold: float) -> float:
        given = [answer.given(threshold) for answer in answers]
        return sum(answer_f1(text, texts) for text, texts in zip(given, references, strict=True)) / len(asked)

    best, threshold = best_threshold(answers, references)
    assert best == pytest.approx(max(mean(t) for t in range(-5, 5)))
    assert mean(threshold) == pytest.approx(best)


@given(st.integers(0, 10_000), st.integers(3, 40))
def test_the_best_span_is_that_of_all_pairs(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    values, context = rng.normal(size=(2, tokens)), int(rng.integers(1, tokens))
    offsets = np.array([(-1, -1)] * context + [(5 * i, 5 * i + 4) for i in range(tokens - context)])
    starts, ends = (np.argsort(-side[context:], kind="stable")[:BEST] + context for side in values)
    allowed = [(s, e) for s, e in itertools.product(starts, ends) if s <= e < s + MAX_TOKENS]
    found = best_span(values, offsets)
    if not allowed:
        assert found is None
        return
    start, end = max(allowed, key=lambda span: values[0, span[0]] + values[1, span[1]])
    assert found == (pytest.approx(values[0, start] + values[1, end]), offsets[start, 0], offsets[end, 1])


def test_a_window_without_context_has_no_span() -> None:
    assert best_span(np.zeros((2, 3)), np.full((3, 2), -1)) is None


def test_agreement_needs_no_labels() -> None:
    task = tasks.find_task("sst2")
    assert tasks.agreement(task, np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1])) == {"same_predictions": 0.75}
    tags = tasks.agreement(tasks.find_task("conll2003"), [["O", "B-PER"], ["O"]], [["O", "O"], ["O"]])
    assert tags == {"same_predictions": pytest.approx(2 / 3)}
    found = tasks.agreement(tasks.find_task("sts"), np.array([0.1, 0.5]), np.array([0.2, 0.8]))
    assert found == {"spearman": pytest.approx(1), "mean_difference": pytest.approx(0.2)}
    mine, theirs = [Answer("rome", 1.0), Answer("x", -1.0)], [Answer("paris", 2.0), Answer("x", -2.0)]
    assert tasks.agreement(tasks.find_task("squad-v2"), mine, theirs)["same_predictions"] == 1
    assert tasks.agreement(tasks.find_task("squad"), mine, theirs)["same_predictions"] == 0.5
