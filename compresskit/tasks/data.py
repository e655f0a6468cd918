"""Examples of a task, read and checked before anything is computed.

Whatever the source calls its columns, the examples call them: `text`, `text_pair` and `label` (classification,
regression, similarity), `text` (language modelling), `tokens` and `tags` (token classification), `id`, `question`,
`context`, `answer_texts` and `answer_starts` (question answering).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, final

import datasets

from compresskit.errors import DataError
from compresskit.tasks.find import TABLES, find_files, hub_source, load_hub
from compresskit.tasks.labels import label_index, label_number, name_index, sorted_names
from compresskit.tasks.rows import Row, read_rows
from compresskit.tasks.task import Task
from compresskit.texts import documents

Examples: TypeAlias = Any
"""A `datasets.Dataset` with columns as above; `datasets` has no types."""


def load_task_data(task: Task, data: str | Path | None = None, split: str = "train") -> Examples:
    """The examples of a split, every one checked; in memory.

    Args:
        data: a file, a folder with the splits, a folder with a folder for this task, or a hub id; None: the hub's own.
        split: `train`, `dev`, `test`, or what the task or the files call theirs.

    Raises:
        DataError: nothing there, a missing column, a malformed or empty row, a label that the task does not have;
            names file and line.
    """
    if task.kind == "text":
        raise DataError("plain text has no examples of a task; load_corpus reads it")
    if task.has_named_labels and not task.label_names:
        task = with_labels_of(task, data, split)
    rows = list(_rows(task, data, split))
    if not rows:
        raise DataError(f"{data} holds no text")
    columns = _columns(task, rows[0])
    make = _MAKERS[task.kind](task)
    examples = [_checked(make, row, columns) for row in rows]
    if task.kind == "question-answering":
        _check_unique(rows, [example["id"] for example in examples])
    features = datasets.Features(_FEATURES[task.kind](task))
    return datasets.Dataset.from_dict(
        {name: [example[name] for example in examples] for name in features}, features=features
    )


def with_labels_of(task: Task, data: str | Path | None = None, split: str = "train") -> Task:
    """The task with the labels that occur in a split, sorted; unchanged if it names its labels or has none.

    Raises:
        DataError: as `load_task_data`, or fewer than two labels.
    """
    if not task.has_named_labels or task.label_names:
        return task
    found: set[Any] = set()
    columns: _Columns | None = None
    for row in _rows(task, data, split):
        columns = columns or _columns(task, row)
        value = columns.value(row, "label")
        values = value if task.kind == "token-classification" else [value]
        if not isinstance(values, list) or any(item in (None, "") for item in values):
            raise row.error(f"there is no label ({value!r})")
        found.update(values)
    if len(found) < 2:
        raise DataError(f"the split {split!r} has one label only ({', '.join(map(str, found))}): nothing to learn")
    return replace(task, label_names=sorted_names(found))


@final
@dataclass(frozen=True)
class _Columns:
    """Which column of the source plays which role."""

    names: Mapping[str, str]

    def value(self, row: Row, role: str) -> Any:
        if self.names[role] not in row.values:
            raise row.error(f"the column {self.names[role]!r} is missing")
        return row.values[self.names[role]]


def _rows(task: Task, data: str | Path | None, split: str) -> Iterator[Row]:
    source = hub_source(task, data)
    if source is not None:
        dataset = load_hub(source, task, split)
        label = source.id if source.config is None else f"{source.id}:{source.config}"
        names = _hub_names(task, dataset)
        for number, values in enumerate(dataset, 1):
            row = Row(f"{label}, split {split}", "row", number, names(values))
            if not _is_blank(task, row):
                yield row
        return
    assert data is not None
    expected = [*task.text_columns, *([task.label_column] if task.label_column else [])]
    for path in find_files(task, data, split):
        if task.kind == "language-modelling" and path.suffix not in TABLES:
            for number, text in enumerate(documents([path]), 1):
                yield Row(str(path), "document", number, {task.text_columns[0][0]: text})
        else:
            rows = read_rows(path, expected=expected, headerless=task.headerless)
            yield from (row for row in rows if not _is_blank(task, row))


def _is_blank(task: Task, row: Row) -> bool:
    """Whether a row of plain text is an empty line."""
    if task.kind != "language-modelling":
        return False
    texts = [row.values[name] for name in task.text_columns[0] if name in row.values]
    return bool(texts) and isinstance(texts[0], str) and not texts[0].strip()


def _hub_names(task: Task, dataset: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Turns the numbers of labels into their names, where the dataset has names: its order may be another."""
    column = next((name for name in task.label_column if name in dataset.features), None)
    feature = None if column is None else dataset.features[column]
    inner = getattr(feature, "feature", feature)  # a list of labels, for tags
    if column is None or not isinstance(inner, datasets.ClassLabel):
        return lambda values: values

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        return value if value is None or value < 0 else inner.int2str(value)

    return lambda values: {**values, column: named(values[column])}


def _columns(task: Task, row: Row) -> _Columns:
    """Which columns of a first row are meant.

    Raises:
        DataError: one is missing; lists those that are there.
    """
    roles: dict[str, Sequence[str]] = {f"text{i}": names for i, names in enumerate(task.text_columns)}
    if task.label_column:
        roles["label"] = task.label_column
    if task.kind == "question-answering":
        roles["id"] = ("id",)
    chosen: dict[str, str] = {}
    for role, names in roles.items():
        name = next((name for name in names if name in row.values), None)
        if name is None:
            raise DataError(
                f"{row.source} has no column {' or '.join(map(repr, names))}; its columns are "
                f"{', '.join(map(repr, row.values))}. --text-column and --label-column name others"
            )
        chosen[role] = name
    return _Columns(chosen)


def _checked(make: Callable[[Row, _Columns], dict[str, Any]], row: Row, columns: _Columns) -> dict[str, Any]:
    try:
        return make(row, columns)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise row.error(str(error)) from error


def _text(columns: _Columns, row: Row, role: str) -> str:
    value = columns.value(row, role)
    if not isinstance(value, str):
        raise row.error(f"the column {columns.names[role]!r} is no text but {value!r}")
    return value


def _make_labelled(task: Task) -> Callable[[Row, _Columns], dict[str, Any]]:
    names = name_index(task.label_names)

    def make(row: Row, columns: _Columns) -> dict[str, Any]:
        texts = [_text(columns, row, f"text{i}") for i in range(len(task.text_columns))]
        if not any(text.strip() for text in texts):
            raise row.error("the text is empty")
        value = columns.value(row, "label")
        label = label_index(value, names) if task.kind == "classification" else label_number(value)
        return {**dict(zip(("text", "text_pair"), texts, strict=False)), "label": label}

    return make


def _make_plain(task: Task) -> Callable[[Row, _Columns], dict[str, Any]]:
    return lambda row, columns: {"text": _text(columns, row, "text0")}


def _make_tagged(task: Task) -> Callable[[Row, _Columns], dict[str, Any]]:
    names = name_index(task.label_names)

    def make(row: Row, columns: _Columns) -> dict[str, Any]:
        tokens, tags = columns.value(row, "text0"), columns.value(row, "label")
        if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
            raise row.error(f"the column {columns.names['text0']!r} is no list of tokens but {tokens!r}")
        if not isinstance(tags, list) or len(tags) != len(tokens):
            raise row.error(f"{len(tokens)} tokens need as many tags, found {tags!r}")
        if not tokens:
            raise row.error("there are no tokens")
        return {"tokens": tokens, "tags": [label_index(tag, names) for tag in tags]}

    return make


def _make_question(task: Task) -> Callable[[Row, _Columns], dict[str, Any]]:
    def make(row: Row, columns: _Columns) -> dict[str, Any]:
        question, context = _text(columns, row, "text0"), _text(columns, row, "text1")
        if not question.strip() or not context.strip():
            raise row.error("the question or the context is empty")
        answers = columns.value(row, "label")
        texts = answers.get("text") if isinstance(answers, dict) else None
        starts = answers.get("answer_start") if isinstance(answers, dict) else None
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise row.error(f"answers are an object with the lists 'text' and 'answer_start', found {answers!r}")
        if not texts and not task.unanswerable:
            raise row.error(f"the question has no answer; the task {task.name} wants one (squad-v2 does not)")
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not isinstance(start, int) or not 0 <= start < len(context):
                raise row.error(f"the answer {text!r} at {start!r} is not inside the context")
        name = columns.value(row, "id")
        return {
            "id": str(row.number if name is None else name),
            "question": question,
            "context": context,
            "answer_texts": texts,
            "answer_starts": starts,
        }

    return make


def _check_unique(rows: list[Row], names: list[str]) -> None:
    seen: set[str] = set()
    for row, name in zip(rows, names, strict=True):
        if name in seen:
            raise row.error(f"a second question has the id {name!r}")
        seen.add(name)


def _text_features(task: Task) -> dict[str, Any]:
    texts = ("text", "text_pair")[: len(task.text_columns)]
    label = datasets.ClassLabel(names=list(task.label_names)) if task.has_named_labels else datasets.Value("float32")
    return {**{name: datasets.Value("large_string") for name in texts}, "label": label}


def _plain_features(task: Task) -> dict[str, Any]:
    return {"text": datasets.Value("large_string")}


def _tag_features(task: Task) -> dict[str, Any]:
    tags = datasets.List(datasets.ClassLabel(names=list(task.label_names)))
    return {"tokens": datasets.List(datasets.Value("string")), "tags": tags}


def _question_features(task: Task) -> dict[str, Any]:
    texts = {name: datasets.Value("large_string") for name in ("id", "question", "context")}
    answers = {"answer_texts": datasets.Value("string"), "answer_starts": datasets.Value("int32")}
    return {**texts, **{name: datasets.List(value) for name, value in answers.items()}}


_MAKERS: dict[str, Callable[[Task], Callable[[Row, _Columns], dict[str, Any]]]] = {
    "classification": _make_labelled,
    "regression": _make_labelled,
    "similarity": _make_labelled,
    "language-modelling": _make_plain,
    "token-classification": _make_tagged,
    "question-answering": _make_question,
}
_FEATURES: dict[str, Callable[[Task], dict[str, Any]]] = {
    "classification": _text_features,
    "regression": _text_features,
    "similarity": _text_features,
    "language-modelling": _plain_features,
    "token-classification": _tag_features,
    "question-answering": _question_features,
}
