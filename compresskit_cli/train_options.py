"""Options of commands that train; their names and defaults are those of `compresskit.tasks.TrainSettings`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def train_options(function: F) -> F:
    """Adds the options that say how a model is trained."""
    at_least_one = click.IntRange(1)
    options = [
        click.option("--epochs", type=float, default=3.0, show_default=True, help="Passes over the training data."),
        click.option("--max-steps", type=at_least_one, help="Stop after this many steps, whatever --epochs says."),
        click.option("--lr", type=float, default=2e-5, show_default=True, help="Highest learning rate."),
        click.option("--batch-size", type=at_least_one, default=32, show_default=True, help="Examples in a batch."),
        click.option(
            "--accumulate", type=at_least_one, default=1, show_default=True, help="Batches whose gradients make a step."
        ),
        click.option("--warmup", type=float, default=0.1, show_default=True, help="Share of steps with a rising rate."),
        click.option(
            "--schedule", type=click.Choice(SCHEDULES), default="linear", show_default=True, help="How the rate falls."
        ),
        click.option("--weight-decay", type=float, default=0.01, show_default=True, help="Of AdamW."),
        click.option(
            "--max-grad-norm", type=float, default=1.0, show_default=True, help="Clip gradients to this norm."
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all chance."),
        click.option("--eval-steps", type=at_least_one, help="Score and save this often. Default: every epoch."),
        click.option("--patience", type=at_least_one, help="Stop after so many scores that are not the best."),
        click.option("--bf16", is_flag=True, help="Multiply in bfloat16."),
        click.option(
            "--device", type=click.Choice(("auto", "cpu")), default="auto", help="auto: an accelerator if there is one."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
