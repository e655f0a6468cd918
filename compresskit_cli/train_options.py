"""Options of commands that train; their names and defaults are those of `compresskit.tasks.TrainSettings`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
AT_LEAST_ONE = click.IntRange(1)
SEED = click.IntRange(0, 2**32 - 1)

OPTIONS: dict[str, dict[str, Any]] = {
    "--epochs": {"type": float, "default": 3.0, "help": "Passes over the training data."},
    "--max-steps": {"type": AT_LEAST_ONE, "help": "Stop after this many steps, whatever --epochs says."},
    "--lr": {"type": float, "default": 2e-5, "help": "Highest learning rate."},
    "--batch-size": {"type": AT_LEAST_ONE, "default": 32, "help": "Examples in a batch."},
    "--accumulate": {"type": AT_LEAST_ONE, "default": 1, "help": "Batches whose gradients make a step."},
    "--warmup": {"type": float, "default": 0.1, "help": "Share of steps with a rising rate."},
    "--schedule": {"type": click.Choice(SCHEDULES), "default": "linear", "help": "How the rate falls."},
    "--weight-decay": {"type": float, "default": 0.01, "help": "Of AdamW."},
    "--max-grad-norm": {"type": float, "default": 1.0, "help": "Clip gradients to this norm."},
    "--dropout": {"type": float, "help": "Of the model while it trains. Default: its own."},
    "--seed": {"type": SEED, "default": 0, "help": "Of all chance."},
    "--eval-steps": {"type": AT_LEAST_ONE, "help": "Score and save this often. Default: every epoch."},
    "--patience": {"type": AT_LEAST_ONE, "help": "Stop after so many scores that are not the best."},
    "--bf16": {"is_flag": True, "help": "Multiply in bfloat16."},
    "--device": {"type": click.Choice(("auto", "cpu")), "default": "auto", "help": "auto: an accelerator if any."},
}


def train_options(function: F) -> F:
    """Adds the options that say how a model is trained."""
    shown = {name: {**how, "show_default": "default" in how} for name, how in OPTIONS.items()}
    return add_options(function, shown)


def add_options(function: F, options: dict[str, dict[str, Any]]) -> F:
    """Adds options, in this order, to a command."""
    for name, how in reversed(options.items()):
        function = click.option(name, **how)(function)
    return function
