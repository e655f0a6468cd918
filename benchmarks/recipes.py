"""Distillation by preset with what its runs share: teachers and stage-1 students. Imports torch: import it late.

Everything lies in one work folder and is made when it is missing; what was interrupted goes on where it was.
"""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import transformers
from filelock import FileLock

from benchmarks.devices import trains_on
from benchmarks.embeddings import SENTENCES, read_sentences
from benchmarks.experiments.recipe import BEFORE
from benchmarks.models import REAL, load_model, minilm_folder
from compresskit.recipes import Preset, distill
from compresskit.tasks import (
    Task,
    TrainSettings,
    close_run,
    custom_task,
    find_task,
    finetune_,
    interrupted_run,
    model_for,
    tokenizer_for,
    with_labels_of,
)

HELD_OUT = 800
"""Of its rows, to choose the best checkpoint by."""
OWN = "own"
"""The task and the texts that this project has itself: its sentences, labelled by their length."""


@final
@dataclass(frozen=True)
class Workshop:
    """What the runs of one model share.

    Args:
        work: folder for everything that is made.
        data: folder with `glue` and `text`; None: only what is our own.
        model: name of `benchmarks.models`.
        seed: of a random model and of the teachers.
        dtype: bfloat16 multiplies in that type.
        device: where models are trained.
    """

    work: Path
    data: Path | None
    model: str
    seed: int
    dtype: str
    device: str = "cpu"

    def base(self) -> Path:
        """Folder of the pre-trained model."""
        if self.model == REAL:
            return minilm_folder()
        folder = self.work / f"model-{self.model}-{self.seed}"
        with self._alone(folder):
            if not folder.exists():
                made, tokenizer = load_model(self.model, seed=self.seed, sentences=read_sentences())
                _save(made, tokenizer, folder)
        return folder

    def task(self, name: str) -> tuple[Task, Path]:
        """A task and the folder of its data."""
        if name != OWN:
            assert self.data is not None
            return find_task(name), self.data / "glue"
        folder = self.work / "own-task"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"text": text, "label": "long" if len(text) > 50 else "short"} for text in read_sentences()]
        for split, part in (("train", rows[::2]), ("dev", rows[1::2])):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
        return custom_task("classification", ("text",), label_names=("long", "short")), folder

    def corpus(self, name: str) -> Path:
        """Plain text."""
        if name == OWN:
            return SENTENCES
        assert self.data is not None
        return self.data / "text"

    def teacher(self, name: str, settings: Mapping[str, Any], before: str = "") -> Path:
        """Folder `teacher-<task>` of the model that was fine-tuned on a task; made unless it is there.

        Args:
            before: that was learnt first, of `BEFORE`, if any.
        """
        folder = self.work / (f"teacher-{name}-after-{before}" if before else f"teacher-{name}")
        start = self._learned(before) if before else self.base()
        with self._alone(folder):
            if not folder.exists():
                self._finetune(*self.task(name), start, folder, settings)
        return folder

    def _learned(self, name: str) -> Path:
        """Folder `before-<name>` of the model that was fine-tuned on a dev set whose task has no other data."""
        assert self.data is not None
        source, columns, settings = BEFORE[name]
        folder, parts = self.work / f"before-{name}", self.work / f"before-{name}-data"
        with self._alone(folder):
            if not folder.exists():
                rows = (self.data / source).read_text(encoding="utf-8").splitlines()
                random.Random(0).shuffle(rows)  # noqa: S311 - a split, no secret
                parts.mkdir(parents=True, exist_ok=True)
                for split, part in (("train", rows[HELD_OUT:]), ("dev", rows[:HELD_OUT])):
                    (parts / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
                self._finetune(custom_task("classification", columns, "label"), parts, self.base(), folder, settings)
        return folder

    def _finetune(self, task: Task, data: Path, start: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        where = trains_on(self.device)
        training = TrainSettings(seed=self.seed, bf16=self.dtype == "bfloat16", device=where, **settings)
        transformers.set_seed(self.seed)  # of the new head
        model = model_for(with_labels_of(task, data, "train"), start, new_head=True)
        tokenizer, run = tokenizer_for(start), folder.with_name(f"{folder.name}.training")
        resume = interrupted_run(run)
        finetune_(model, tokenizer, with_labels_of(task, data, "train"), data, run, training, resume=resume)
        _save(model.cpu(), tokenizer, folder)
        close_run(run)

    def stage_1(self, preset: Preset, by: Path, ratio: float, texts: str, key: str) -> Path:
        """Folder `stage1-<key>` of a student that a model distilled on plain text; made unless it is there."""
        folder = self.work / f"stage1-{key}"
        with self._alone(folder):
            if not folder.exists():
                self._distill_on_text(preset, by, ratio, texts, folder)
        return folder

    def _distill_on_text(self, preset: Preset, by: Path, ratio: float, texts: str, folder: Path) -> None:
        run = self.work / f"{folder.name}.training"
        cache, resume = self.work / "corpus", interrupted_run(run)
        done = distill(preset, by, run, corpus=self.corpus(texts), ratio=ratio, cache=cache, resume=resume)
        said = {"stages": done.to_json()["stages"], "parameters": done.params}
        _save(done.student, done.tokenizer, folder, {"stage1.json": json.dumps(said)})
        close_run(run)

    def _alone(self, path: Path) -> FileLock:
        """While it is held no other process makes what lies there; several experiments may run side by side."""
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / path.name)

    def distill(
        self, preset: Preset, name: str, teacher: Path, key: str, *, student: Path | None, ratio: float
    ) -> dict[str, Any]:
        """The result of the task stage alone: of a student that has seen plain text, or one that is made here."""
        task, data = self.task(name)
        run = self.work / f"recipe-{key}.training"
        done = distill(
            preset,
            teacher,
            run,
            task=task,
            data=data,
            student=student,
            ratio=ratio if student is None else None,
            cache=self.work / "answers",
            cache_teacher=self.device == "cpu",  # a GPU answers sooner than a disk
            resume=interrupted_run(run),
        )
        close_run(run)
        return done.to_json()


def stage_1_figures(folder: Path) -> dict[str, Any]:
    """What the training of a stage-1 student came to."""
    figures: dict[str, Any] = json.loads((folder / "stage1.json").read_text(encoding="utf-8"))
    return figures


def _save(model: Any, tokenizer: Any, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a model's folder that is either complete or not there."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name, text in (texts or {}).items():
        (partial / name).write_text(text, encoding="utf-8")
    partial.rename(folder)
