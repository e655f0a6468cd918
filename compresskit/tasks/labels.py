"""Labels: from what a file says to numbers, and which number means what in a model."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from compresskit.errors import DataError
from compresskit.tasks.task import Task

UNLABELLED = (None, "", "-", -1, "-1")
DEFAULT_NAME = re.compile(r"LABEL_\d+")


def label_index(value: Any, names: Mapping[str, int]) -> int:
    """The number of a label that is given by name, or by number where no name looks like one.

    Args:
        names: of `name_index`.

    Raises:
        ValueError: says what was found and what is known.
    """
    if value in UNLABELLED and plain(str(value)) not in names:
        raise ValueError(f"there is no label ({value!r}); this split cannot be used for training or scoring")
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if plain(str(value)) in names:
        return names[plain(str(value))]
    if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"\d+", value)):
        if 0 <= int(value) < len(names):
            return int(value)
        raise ValueError(f"the label {value!r} is not below {len(names)}; the labels are {', '.join(names)}")
    raise ValueError(f"unknown label {value!r}; the labels are {', '.join(names)}")


def name_index(names: Iterable[str]) -> dict[str, int]:
    """Number of each label by its plain name."""
    return {plain(name): index for index, name in enumerate(names)}


def plain(name: str) -> str:
    """Names that differ only in case, blanks, dashes and underscores are the same."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def label_number(value: Any) -> float:
    """A finite number for regression.

    Raises:
        ValueError: it is none.
    """
    if value in (None, "", "-"):
        raise ValueError(f"there is no label ({value!r}); this split cannot be used for training or scoring")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the label {value!r} is not a number") from error
    if not math.isfinite(number):
        raise ValueError(f"the label {value!r} is not finite")
    return number


def sorted_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Names for the labels that occur: numbers by size, words by alphabet, `O` of tags first."""
    names = {str(int(value) if isinstance(value, bool) else value) for value in values}
    if all(re.fullmatch(r"\d+", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def align_labels(task: Task, config: Any) -> Task:
    """The task with its labels in the order of the model.

    Args:
        config: of a model with a head. Names like LABEL_0, or numbers, say nothing: the task's order is kept.

    Raises:
        DataError: the model has another number of labels, or other names for them.
    """
    if task.kind == "regression":
        if config.num_labels != 1:
            raise DataError(
                f"the task {task.name} is a regression with one output, the model has {config.num_labels} labels; "
                "finetune makes a model for it"
            )
        return task
    if not task.has_named_labels:
        return task
    found = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    anonymous = all(DEFAULT_NAME.fullmatch(name) or name.isdigit() for name in found)
    names = tuple(str(i) for i in range(len(found))) if anonymous else found
    if not task.label_names:
        return replace(task, label_names=names)
    if len(found) != len(task.label_names):
        raise DataError(
            f"the task {task.name} has {len(task.label_names)} labels ({', '.join(task.label_names)}), the model "
            f"{len(found)} ({', '.join(found)}); finetune makes a model for it"
        )
    if anonymous or list(map(plain, found)) == list(map(plain, task.label_names)):
        return task
    if {plain(name) for name in found} == {plain(name) for name in task.label_names}:
        mine = {plain(name): name for name in task.label_names}
        return replace(task, label_names=tuple(mine[plain(name)] for name in found))
    raise DataError(
        f"the model calls its labels {', '.join(found)}, the task {task.name} calls them "
        f"{', '.join(task.label_names)}; give the task's names in the model's order (--label-names)"
    )
