"""Options that say by which task plans are compared, for the commands that choose structures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compresskit.calibration import Judge

F = TypeVar("F", bound=Callable[..., Any])

SPLIT = "dev"


@dataclass(frozen=True)
class TaskJudge:
    """What the shared options say."""

    compare_by: str | None
    compare_data: str | None
    compare_split: str | None

    def check(self, compare: bool) -> None:
        """Raise UsageError where options contradict each other."""
        given = {"--compare-data": self.compare_data, "--compare-split": self.compare_split}
        if self.compare_by is None:
            if idle := [option for option, value in given.items() if value is not None]:
                raise click.UsageError(f"{' and '.join(idle)} need --compare-by TASK, the task to compare models by")
        elif compare:
            raise click.UsageError("--compare-by goes by a task, --compare by answers on the texts: give one of them")

    def check_methods(self, arguments: Mapping[str, Any]) -> None:
        """Raise UsageError if none of the methods in arguments of `compresskit.compress` chooses between others."""
        methods = [arguments["method"], *(method for _, method in arguments["rules"])]
        found = [method for method in methods if method is not None]
        if self.compare_by is not None and not any(method.alone() for method in found):
            names = " and ".join(sorted({method.name for method in found}))
            raise click.UsageError(
                f"--compare-by compares plans of a method that chooses between others, as auto does: {names} does not"
            )

    def given(self) -> dict[str, Any]:
        """What was said at all, for the record; names, not whole paths."""
        if self.compare_by is None:
            return {}
        data = None if self.compare_data is None else Path(self.compare_data).name
        return {"compare_by": self.compare_by, "compare_data": data, "compare_split": self.compare_split or SPLIT}

    def made(self, model: "PreTrainedModel", folder: Path) -> "Judge | None":
        """1 minus the task's primary metric; the data is read, and the model itself scored, first.

        Raises:
            UnknownNameError: no task of this name.
            DataError: the data is missing or malformed, or does not fit the model.
        """
        if self.compare_by is None:
            return None
        from compresskit.errors import DataError
        from compresskit.tasks import align_labels, find_task, load_task_data, run_evaluation, tokenizer_for
        from compresskit_cli.training import quiet

        quiet()
        task = align_labels(find_task(self.compare_by), model.config)
        examples = load_task_data(task, self.compare_data, self.compare_split or SPLIT)
        tokenizer = tokenizer_for(folder)

        def judge(small: Any) -> float:
            return 1 - run_evaluation(small, tokenizer, task, examples, align=False).metrics[task.primary]

        try:
            judge(model)
        except AttributeError as error:  # its output has no such field
            raise DataError(f"{type(model).__name__} has no head for {task.name}: {error}") from error
        return judge


def compare_options(function: F) -> F:
    """Adds the options that have models compared by a task."""
    options = [
        click.option(
            "--compare-by",
            metavar="TASK",
            help="Where a method chooses between others (auto), compare by the score on a task: sts, sst2, ...",
        ),
        click.option(
            "--compare-data", metavar="WHERE", help="Its data, as in evaluate. Default: the task's on the hub."
        ),
        click.option("--compare-split", metavar="NAME", help=f"Split of it. Default: {SPLIT}."),
    ]
    for option in reversed(options):
        function = option(function)
    return function
