"""What a task is: which columns hold its texts and labels, what its labels are called, how it is scored."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Literal, final, get_args

from compresskit.errors import OptionError, UnknownNameError

Kind = Literal[
    "classification",
    "regression",
    "token-classification",
    "question-answering",
    "similarity",
    "language-modelling",
    "text",
]
KINDS: tuple[str, ...] = get_args(Kind)

METRICS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
    "question-answering": ("exact_match", "answer_f1"),
    "similarity": ("spearman", "pearson"),
    "language-modelling": ("log_likelihood", "perplexity", "word_accuracy"),
    "text": (),
}
"""Every metric is between -1 and 1 (correlations) or 0 and 1, the higher the better; but two of language modelling: the
mean logarithm of a word's probability in nats, and the perplexity, exp of minus that, of which less is better."""

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
"""What files and hub datasets call a split."""


@final
@dataclass(frozen=True)
class HubSource:
    """Where `datasets` finds a task: id, configuration and revision on the hub."""

    id: str
    config: str | None = None
    revision: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A task as data; `load_task_data`, `model_for` and `evaluate` follow it.

    Args:
        kind: what the model predicts; `similarity` is the cosine of embeddings, `language-modelling` the words of plain
            text, the next ones or masked ones, as the model was made for; `text` has nothing to predict.
        text_columns: one entry for each text, all names that files give it, the usual one first.
        label_column: all names that files give the label.
        label_names: of the labels 0, 1, ...; empty where the data or the model has to say them.
        metrics: the first is the primary one, which chooses the best checkpoint.
        hub: where it is on the hub.
        folders: names of its folder in a collection such as GLUE; case and punctuation do not count.
        headerless: names of the columns of delimited files that have no header line.
        splits: further names of splits.
        max_length: tokens of an input by default.
        unanswerable: questions may have no answer in the text (SQuAD 2.0).
    """

    name: str
    kind: Kind
    text_columns: tuple[tuple[str, ...], ...]
    label_column: tuple[str, ...] = ("label",)
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    hub: HubSource | None = None
    folders: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    splits: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(SPLITS), hash=False)
    max_length: int = 128
    unanswerable: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"{self.kind!r} is no kind of task; known: {', '.join(KINDS)}")
        known = METRICS_OF[self.kind]
        if not self.metrics:
            object.__setattr__(self, "metrics", known)
        foreign = [name for name in self.metrics if name not in known]
        if foreign:
            raise OptionError(f"{self.kind} has no metric {foreign[0]!r}; it has: {', '.join(known) or 'none'}")
        if self.metrics[:1] == ("perplexity",):
            raise OptionError("perplexity chooses no best checkpoint, as less is better: put log_likelihood first")
        wanted = {
            "language-modelling": (1,),
            "similarity": (2,),
            "question-answering": (2,),
            "token-classification": (1,),
        }.get(self.kind, (1, 2))
        if len(self.text_columns) not in wanted:
            raise OptionError(
                f"a task of kind {self.kind} has {' or '.join(map(str, wanted))} text column(s), "
                f"not {len(self.text_columns)}"
            )
        if len(set(self.label_names)) != len(self.label_names):
            raise OptionError(f"two labels have the same name: {', '.join(self.label_names)}")

    @property
    def primary(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.metrics[0]

    @property
    def best(self) -> float:
        """The primary metric of a model that is always right."""
        return 0.0 if self.primary == "log_likelihood" else 1.0

    @property
    def has_labels(self) -> bool:
        """Whether there is something to train on; else models are only scored."""
        return self.kind not in ("similarity", "language-modelling", "text")

    @property
    def has_named_labels(self) -> bool:
        """Whether predictions are one of several labels."""
        return self.kind in ("classification", "token-classification")


_tasks: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known by its name.

    Raises:
        OptionError: another task has this name.
    """
    if _tasks.get(task.name, task) != task:
        raise OptionError(f"two tasks are called {task.name!r}")
    _tasks[task.name] = task
    return task


def tasks() -> dict[str, Task]:
    """All registered tasks by name."""
    return dict(sorted(_tasks.items()))


def find_task(name: str) -> Task:
    """The registered task of this name.

    Raises:
        UnknownNameError: names the nearest one.
    """
    key = name.lower()
    if key not in _tasks:
        near = difflib.get_close_matches(key, _tasks, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownNameError(f"no task is called {name!r}{hint} Known: {', '.join(tasks())}")
    return _tasks[key]


def custom_task(
    kind: Kind,
    text_columns: tuple[str, ...],
    label_column: str | None = None,
    *,
    label_names: tuple[str, ...] = (),
    metrics: tuple[str, ...] = (),
) -> Task:
    """A task for one's own files.

    Args:
        text_columns: one, or two for pairs; question and context for question answering.
        label_column: None: the usual name for the kind.
        label_names: in the order of the labels; empty: those of the training data, sorted.
        metrics: the first is the primary one; empty: all that fit the kind and need no special label.

    Raises:
        OptionError: no such kind or metric, or a number of columns that the kind cannot have.
    """
    if kind == "language-modelling" and (label_column is not None or label_names):
        raise OptionError("language modelling predicts the text itself: leave out label column and label names")
    usual: dict[str, tuple[str, ...]] = {
        "question-answering": ("answers",),
        "token-classification": ("ner_tags", "tags", "labels"),
        "language-modelling": (),
    }
    default = {"classification": ("accuracy", "macro_f1", "mcc")}
    return Task(
        name="custom",
        kind=kind,
        text_columns=tuple((column,) for column in text_columns),
        label_column=usual.get(kind, ("label", "score")) if label_column is None else (label_column,),
        label_names=label_names,
        metrics=metrics or default.get(kind, ()),
        max_length={"question-answering": 384, "language-modelling": 512}.get(kind, 128),
        unanswerable=kind == "question-answering",
    )


def with_columns(
    task: Task,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str | None = None,
    label_names: tuple[str, ...] = (),
    file_columns: tuple[str, ...] = (),
) -> Task:
    """The task with other names of columns and labels; what is empty or None stays.

    Args:
        file_columns: names of all columns, in order, of files without a header line.
    """
    return replace(
        task,
        text_columns=tuple((column,) for column in text_columns) or task.text_columns,
        label_column=task.label_column if label_column is None else (label_column,),
        label_names=label_names or task.label_names,
        headerless=file_columns or task.headerless,
    )
