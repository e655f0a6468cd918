"""Options that say by which task whole models are judged, for the commands that choose structures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compresskit_cli.calibration_options import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compresskit.calibration import Judge

F = TypeVar("F", bound=Callable[..., Any])

SPLIT = "dev"


@dataclass(frozen=True)
class TaskJudge:
    """What the shared options say."""

    judge: str | None
    judge_data: str | None
    judge_split: str | None

    def check(self, texts: Samples) -> None:
        """Raise UsageError where options contradict each other, or nothing is judged."""
        given = {"--judge-data": self.judge_data, "--judge-split": self.judge_split}
        if self.judge is None:
            if idle := [option for option, value in given.items() if value is not None]:
                raise click.UsageError(f"{' and '.join(idle)} need --judge TASK, the task to judge models by")
        elif not texts.tries_models:
            raise click.UsageError(
                "--judge says what --compare and --sensitivity searched go by: give one of these or both with it"
            )

    def given(self) -> dict[str, Any]:
        """What was said at all, for the record; names, not whole paths."""
        if self.judge is None:
            return {}
        data = None if self.judge_data is None else Path(self.judge_data).name
        return {"judge": self.judge, "judge_data": data, "judge_split": self.judge_split or SPLIT}

    def made(self, model: "PreTrainedModel", folder: Path) -> "Judge | None":
        """What the task's primary metric lacks of the best, 1 or 0 nats; the model itself is scored first.

        Raises:
            UnknownNameError: no task of this name.
            DataError: the data is missing or malformed, or does not fit the model.
        """
        if self.judge is None:
            return None
        from compresskit.tasks import DevSet, align_labels, find_task, load_task_data, tokenized, tokenizer_for
        from compresskit_cli.training import quiet

        quiet()
        task, tokenizer = align_labels(find_task(self.judge), model.config), tokenizer_for(folder)
        examples = load_task_data(task, self.judge_data, self.judge_split or SPLIT)
        scored = DevSet(task, tokenizer, examples, tokenized(examples, task, tokenizer))

        def judge(small: Any) -> float:
            return task.best - scored.metrics(small)[task.primary]

        judge(model)
        return judge


def judge_options(function: F) -> F:
    """Adds the options that have models judged by a task."""
    options = [
        click.option(
            "--judge",
            metavar="TASK",
            help="What --compare and --sensitivity searched go by: the score on a task (sts, perplexity, ...).",
        ),
        click.option("--judge-data", metavar="WHERE", help="Its data, as in evaluate. Default: the task's on the hub."),
        click.option("--judge-split", metavar="NAME", help=f"Split of it. Default: {SPLIT}."),
    ]
    for option in reversed(options):
        function = option(function)
    return function
