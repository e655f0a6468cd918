"""Options that say which task and which data, for every command that trains or evaluates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from compresskit.tasks import Task

F = TypeVar("F", bound=Callable[..., Any])

KINDS = (
    *("classification", "regression", "token-classification", "question-answering"),
    *("similarity", "language-modelling"),
)


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names between commas: `negative,positive`."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(names) or len(set(names)) != len(names):
            self.fail(f"{value!r} is not a list of different names between commas", param, ctx)
        return names


@dataclass(frozen=True)
class TaskChoice:
    """What the shared options say."""

    task: str | None
    kind: str | None
    text_columns: tuple[str, ...]
    label_column: str | None
    label_names: tuple[str, ...]
    file_columns: tuple[str, ...]
    metrics: tuple[str, ...]

    def chosen(self) -> "Task":
        """The task that is meant.

        Raises:
            UnknownNameError: no task of this name.
            OptionError: a metric or a number of columns that the kind does not have.
        """
        from compresskit.tasks import custom_task, find_task, with_columns

        if (self.task is None) == (self.kind is None):
            raise click.UsageError(
                "say which task: --task NAME (such as sst2), or --kind KIND with --text-column for a task of your own"
            )
        if self.kind is None:
            assert self.task is not None
            task = find_task(self.task)
            if self.metrics:
                raise click.UsageError("--metric belongs to --kind; a task with a name has its metrics")
        else:
            if not self.text_columns:
                raise click.UsageError("--kind needs --text-column; twice for pairs of texts, or question and context")
            task = custom_task(self.kind, self.text_columns, self.label_column, metrics=self.metrics)  # type: ignore[arg-type]
        return with_columns(
            task,
            text_columns=self.text_columns,
            label_column=self.label_column,
            label_names=self.label_names,
            file_columns=self.file_columns,
        )


def task_options(function: F) -> F:
    """Adds the options that say which task it is and where its data is."""
    options = [
        click.option("--task", metavar="NAME", help="A task with a name: sst2, stsb, squad, sts, perplexity, ..."),
        click.option(
            "--data",
            metavar="WHERE",
            help="Folder, file or hub id (owner/name:config). Default: the task's on the hub.",
        ),
        click.option("--kind", type=click.Choice(KINDS), help="A task of your own, in place of --task."),
        click.option(
            "--text-column", "text_columns", multiple=True, metavar="NAME", help="Column of a text. Twice for pairs."
        ),
        click.option("--label-column", metavar="NAME", help="Column of the label."),
        click.option("--label-names", type=Names(), default=(), metavar="A,B,...", help="Labels 0, 1, ... by name."),
        click.option(
            "--columns",
            "file_columns",
            type=Names(),
            default=(),
            metavar="A,B,...",
            help="All columns of CSV or TSV files that have no header line.",
        ),
        click.option(
            "--metric", "metrics", multiple=True, metavar="NAME", help="With --kind; the first chooses the best."
        ),
        click.option("--max-length", type=click.IntRange(8), help="Tokens of an input at most."),
    ]
    for option in reversed(options):
        function = option(function)
    return function
