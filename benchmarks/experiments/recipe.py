"""A preset on a real task: the teacher, the student, and what is left of the teacher's score."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, ExperimentSkipped, Outcome, SuiteError
from benchmarks.timing import WAYS

STAGES = ("two", "one")
FIRST = ("base", "teacher")
TEACHERS: Mapping[str, Mapping[str, Any]] = {
    "mrpc": {"epochs": 3.0, "lr": 5e-5, "batch_size": 16},
    "rte": {"epochs": 4.0, "lr": 5e-5, "batch_size": 16},
    "cola": {"epochs": 4.0, "lr": 5e-5},
    "stsb": {"epochs": 3.0, "lr": 5e-5, "batch_size": 16},
    "sst2": {"epochs": 1.0, "lr": 5e-5},
}
"""How the teacher of a task is trained; the defaults of `TrainSettings` where nothing stands here."""
BEFORE: Mapping[str, tuple[str, tuple[str, str], Mapping[str, Any]]] = {
    "mnli": ("glue/MNLI/dev_matched.jsonl", ("premise", "hypothesis"), {"epochs": 3.0, "lr": 1e-4}),
}
"""What a teacher may learn before its task: file below --data, columns of texts, and settings."""
AFTER: Mapping[str, Any] = {"epochs": 6.0, "lr": 5e-5, "batch_size": 16}
"""The same after another task."""


@final
@dataclass(frozen=True, kw_only=True)
class Recipe(Experiment):
    """Distillation of a model that was fine-tuned on a task, by a preset at a given size.

    The teacher of a task is made once (`teacher-<task>` in the work folder), and so is the student of the first stage,
    which all tasks share; `seed` is that of both stages of the student, the teacher always has 0.

    Args:
        preset: of `compresskit presets`.
        ratio: of the whole model.
        task: of `compresskit.tasks`, or `own`: our own sentences.
        stages: `two`: plain text and then the task; `one`: the task alone.
        first: whose weights a student of two stages starts from, and who teaches it in the first: `base`, the model
            that was not trained on the task, as in KroneckerBERT, or the task's own `teacher`.
        settings: that differ from the preset, as `corpus.max_steps=1000`.
        model: `minilm`, or a random one.
        texts: of the first stage. `data`: the folder `text` in that of --data; `own`: our own sentences.
        dtype: bfloat16 multiplies in that type, tf32 in TensorFloat-32 where the device can; weights and optimiser are
            float32 all the same.
        device: where everything is trained.
        kernel: `pytorch` or `compiled`: what layers of students run by.
        before: what the teacher learns before its task: `mnli`, of which the data has a dev set alone. Or nothing.
    """

    kind: ClassVar[str] = "recipe"
    later: ClassVar[tuple[str, ...]] = ("device", "first", "kernel", "before")

    preset: str
    ratio: float
    task: str
    stages: str = "two"
    first: str = FIRST[0]
    settings: tuple[str, ...] = ()
    model: str = "minilm"
    texts: str = "data"
    dtype: str = "float32"
    device: str = "cpu"
    kernel: str = WAYS[0]
    before: str = ""

    def run(self, data: Path | None) -> Outcome:
        with TemporaryDirectory() as work:
            return self.run_in(data, Path(work))

    def run_in(self, data: Path | None, work: Path) -> Outcome:
        if self.stages not in STAGES:
            raise SuiteError(f"{self.kind}: stages is {' or '.join(STAGES)}, got {self.stages!r}")
        if self.first not in FIRST or (self.first != FIRST[0] and self.stages != "two"):
            raise SuiteError(f"{self.kind}: first is {' or '.join(FIRST)}, with two stages; got {self.first!r}")
        if self.before and self.before not in BEFORE:
            raise SuiteError(f"{self.kind}: before is nothing or one of {', '.join(BEFORE)}, got {self.before!r}")
        if data is None and (self.task != "own" or self.texts != "own"):
            raise ExperimentSkipped("give the folder that holds glue/ and text/ with --data")
        from benchmarks.devices import device_name, find_device, multiply_in
        from benchmarks.recipes import Workshop, stage_1_figures
        from compresskit import keep_freed_memory

        keep_freed_memory()  # as the command line does; figures are the same
        device = find_device(self.device)
        multiply_in(self.dtype)
        work.mkdir(parents=True, exist_ok=True)
        shop = Workshop(work, data, self.model, 0, self.dtype, self.device)
        student = None
        first: dict[str, Any] | None = None
        teacher = shop.teacher(self.task, AFTER if self.before else TEACHERS.get(self.task, {}), self.before)
        if self.stages == "two":
            by = shop.base() if self.first == FIRST[0] else teacher
            student = shop.stage_1(self._preset("corpus"), by, self.ratio, self.texts, self._stage_1_key())
            first = stage_1_figures(student)
        figures = shop.distill(self._preset("task"), self.task, teacher, self.key(), student=student, ratio=self.ratio)
        primary = next(iter(figures["metrics"]))
        kept = figures["metrics"][primary] / figures["teacher"][primary] if figures["teacher"][primary] else 0.0
        where = {} if device.type == "cpu" else {"device": device_name(device)}
        made = {"compress": self._preset("task").data.get("compress")}  # presets change; None: nothing is factorised
        return Outcome({**figures, **made, "stage_1": first, "primary": primary, "kept": kept, **where})

    def _preset(self, part: str) -> Any:
        """The preset with our settings of one of its stages."""
        from benchmarks.devices import trains_on
        from compresskit.recipes import preset

        ours = dict(item.split("=", 1) for item in self.settings)
        bf16 = str(self.dtype == "bfloat16").lower()
        values = {f"{part}.seed": self.seed, f"{part}.device": trains_on(self.device), f"{part}.bf16": bf16}
        return preset(self.preset).with_values(
            {**values, **{name: value for name, value in ours.items() if name.partition(".")[0] != _other(part)}}
        )

    def _stage_1_key(self) -> str:
        """The same for all tasks, unless their teachers teach the first stage."""
        tables = {name: table for name, table in self._preset("corpus").data.items() if name != "task"}
        by = [] if self.first == FIRST[0] else [self.task, *([self.before] if self.before else [])]
        said = json.dumps([self.model, self.texts, self.ratio, tables, *by], sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return f"{self.preset.replace(':', '-')}-{self.ratio:g}-{digest}"

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        primary = figures["primary"]
        return {
            "task": configuration["task"] + (f" after {before}" if (before := configuration.get("before")) else ""),
            "preset": configuration["preset"],
            "asked": f"{configuration['ratio']:g}",
            "stages": configuration["stages"] + (", by the teacher" if configuration.get("first") == FIRST[1] else ""),
            "seed": str(configuration["seed"]),
            "parameters": f"{figures['parameters']:,}",
            "metric": primary,
            "teacher": f"{figures['teacher'][primary]:.3f}",
            "before this stage": f"{figures['before'][primary]:.3f}",
            "student": f"{figures['metrics'][primary]:.3f}",
            "of the teacher": f"{figures['kept']:.1%}",
        }


def _other(part: str) -> str:
    return "task" if part == "corpus" else "corpus"
