"""What a distillation came to, read from its logs."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from compresskit.errors import TrainingError
from compresskit.recipes.definition import Preset
from compresskit.recipes.stages import LOG
from compresskit.recipes.students import Model
from compresskit.tasks import Task

Entry = dict[str, Any]


@final
@dataclass(frozen=True)
class StageResult:
    """What one stage came to.

    Args:
        name: `corpus` or `task`.
        steps: optimiser steps that were done.
        best_step: after which the student was taken; the last one where nothing is scored.
        metrics: of the dev split at that step; empty where nothing is scored.
        loss: mean of the last entry of the log, with its terms.
        time_s: of the process that ended it.
        curve: (step, metrics) of every score.
    """

    name: str
    steps: int
    best_step: int
    metrics: dict[str, float]
    loss: dict[str, float]
    time_s: float
    curve: tuple[tuple[int, dict[str, float]], ...]


@final
@dataclass(frozen=True)
class Distilled:
    """A trained student.

    Args:
        student: in eval mode, on the processor.
        tokenizer: of all the models.
        preset: with all values that were used.
        task: None without one.
        metrics, before, teacher: of the dev split: the student; as it is made of the teacher, untrained; the teacher.
        params, teacher_params: of the whole models.
        stages: in order.
        max_length: tokens of an input of the task at most, None: as the task has it.
        time_s: of this process alone, if the run was resumed.
    """

    student: Model = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    preset: Preset
    task: Task | None
    metrics: dict[str, float]
    before: dict[str, float]
    teacher: dict[str, float]
    params: int
    teacher_params: int
    stages: tuple[StageResult, ...]
    max_length: int | None
    time_s: float

    @property
    def ratio(self) -> float:
        """Parameters of the teacher / of the student, whole models."""
        return self.teacher_params / self.params

    def to_json(self) -> dict[str, Any]:
        """Everything but the models, as plain data."""
        return {
            "preset": self.preset.title,
            "task": None if self.task is None else self.task.name,
            "metrics": self.metrics,
            "before": self.before,
            "teacher": self.teacher,
            "parameters": self.params,
            "teacher_parameters": self.teacher_params,
            "ratio": self.ratio,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "time_s": self.time_s,
        }


def read_stage(folder: Path, name: str, task: Task | None) -> StageResult:
    """What a stage came to, from the log in the run's folder: an earlier process may have written it.

    Raises:
        TrainingError: the log is damaged.
    """
    lines = _log(folder, name)
    losses = [line for line in lines if "loss" in line]
    if not losses:
        raise TrainingError(f"the log of stage {name} in {folder} has no loss; it is damaged")
    scores = () if task is None else _scores(lines, task)
    steps = max(line["step"] for line in lines)
    best, metrics = max(scores, key=lambda entry: entry[1][task.primary] if task else 0.0, default=(steps, {}))
    return StageResult(
        name=name,
        steps=steps,
        best_step=best,
        metrics=metrics,
        loss={key: value for key, value in losses[-1].items() if key.startswith("loss")},
        time_s=lines[-1]["time_s"],
        curve=scores,
    )


def _scores(lines: list[Entry], task: Task) -> tuple[tuple[int, dict[str, float]], ...]:
    scored = [line for line in lines if f"eval_{task.primary}" in line]
    return tuple((line["step"], {name: line[f"eval_{name}"] for name in task.metrics}) for line in scored)


def combined_log(folder: str | Path, stages: Iterable[str]) -> str:
    """The logs of all stages as JSON lines, each with the name of its stage."""
    entries = [{"stage": name, **line} for name in stages for line in _log(Path(folder), name)]
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def _log(folder: Path, name: str) -> list[Entry]:
    return [json.loads(line) for line in (folder / name / LOG).read_text("utf-8").splitlines()]
