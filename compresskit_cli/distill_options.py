"""Options of `compresskit distill` that change values of a preset: what is not said stays as the preset has it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compresskit_cli.train_options import OPTIONS, add_options

if TYPE_CHECKING:
    from compresskit.recipes import Preset

F = TypeVar("F", bound=Callable[..., Any])

OF_A_STAGE = ("max_steps", "epochs", "lr", "batch_size")
"""Settings that each stage has an option for: `--lr` of the task stage, `--stage1-lr` of the corpus stage."""


def _unset(name: str, help: str | None = None) -> dict[str, Any]:
    how = {key: value for key, value in OPTIONS[name].items() if key != "default"}
    return {**how, "help": help or how["help"], **({} if how.get("is_flag") else {"default": None})}


def preset_options(function: F) -> F:
    """Adds the options that override a preset."""
    stage1 = {
        "--stage1-steps": _unset("--max-steps", "Stop stage 1, on plain text, after this many steps."),
        "--stage1-epochs": _unset("--epochs", "Passes of stage 1 over the corpus."),
        "--stage1-lr": _unset("--lr", "Highest learning rate of stage 1."),
        "--stage1-batch-size": _unset("--batch-size", "Texts in a batch of stage 1."),
    }
    stage2 = {
        "--max-steps": _unset("--max-steps", "Stop stage 2, on the task, after this many steps."),
        "--epochs": _unset("--epochs", "Passes of stage 2 over the task's data."),
        "--lr": _unset("--lr", "Highest learning rate of stage 2."),
        "--batch-size": _unset("--batch-size", "Examples in a batch of stage 2."),
    }
    both = {name: _unset(name) for name in OPTIONS if name not in stage2}
    values = {
        "--set": {
            "multiple": True,
            "metavar": "KEY=VALUE",
            "help": "Any value of the preset, such as corpus.warmup=0.2. Repeatable.",
        }
    }
    return add_options(function, {**stage1, **stage2, **both, **values})


def changed(preset: "Preset", options: Mapping[str, Any]) -> "Preset":
    """The preset with what the options say; settings without a stage are those of both.

    Args:
        options: of `preset_options`, by name; None and False are not said.

    Raises:
        UnknownNameError, OptionError: --set names no value of the preset, or one that it cannot have.
        UsageError: an option for a stage that the preset does not have.
    """
    said = {name: value for name, value in options.items() if value is not None and value is not False}
    texts = dict(_pair(text) for text in said.pop("set"))
    stages = [name for name in ("corpus", "task") if getattr(preset, name) is not None]
    values: dict[str, Any] = {}
    for name, value in said.items():
        setting = name.removeprefix("stage1_").replace("steps", "max_steps") if name.startswith("stage1_") else name
        wanted = ["corpus"] if name.startswith("stage1_") else ["task"] if name in OF_A_STAGE else stages
        if not set(wanted) <= set(stages):
            raise click.UsageError(f"--{name.replace('_', '-')}: preset {preset.title} has no such stage")
        values |= {f"{stage}.{setting}": value for stage in wanted}
    return preset.with_values(values).with_texts(texts)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise click.UsageError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()
