"""A whole distillation: from a preset, a teacher and data to a trained student and what it came to."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compresskit.calibration import Calibration, calibrate
from compresskit.core.native_build import kernel_advice
from compresskit.distill import Stage, TeacherCache, run_stages
from compresskit.distill.anatomy import Anatomy
from compresskit.distill.objective import bind
from compresskit.errors import CompresskitError, DistillError, OptionError
from compresskit.recipes.definition import Preset, StageRecipe
from compresskit.recipes.models import Models, open_models
from compresskit.recipes.results import Distilled, read_stage
from compresskit.recipes.stages import CORPUS, TASK, OnStage, Splits, corpus_rows, corpus_stage, load_splits, task_stage
from compresskit.recipes.students import Model, student_maker
from compresskit.surgery.sites import count_params
from compresskit.tasks import Processes, Task, close_run, open_run

SCORED = "scores.json"
"""In a run's folder: the teacher's and the untrained student's scores, so that a run that is resumed has them."""
STUDENTS = "students"
"""There, too: untrained students for the other processes."""
OnNote = Callable[[str], None]


def distill(
    preset: Preset,
    teacher: str | Path,
    run: str | Path,
    *,
    task: Task | None = None,
    data: str | Path | None = None,
    corpus: str | Path | None = None,
    base: str | Path | None = None,
    student: str | Path | None = None,
    ratio: float | None = None,
    params: int | None = None,
    max_length: int | None = None,
    cache: str | Path | None = None,
    cache_teacher: bool = False,
    cache_bytes: int | None = None,
    resume: bool = False,
    on_progress: OnStage | None = None,
    on_note: OnNote | None = None,
) -> Distilled:
    """Make a student of the teacher as a preset says, and train it: on plain text, then on a task.

    Under `torchrun` or `accelerate launch` in several processes, which share a file system: the first one makes the
    student, the batches of all make a step, and all return the same.

    Args:
        preset: of `preset(...)`, its settings changed by `with_values`.
        teacher: folder or hub id of the model that was trained on the task; without a task any encoder.
        run: folder for checkpoints and logs; kept, so that an interrupted run can be resumed.
        task, data: of `compresskit.tasks`; None: only the corpus stage, for an encoder without a head. A task that is
            only scored (`sts`) chooses the best checkpoint of the corpus stage.
        corpus: folder of `*.txt`, or hub id; None: only the task stage.
        base: pre-trained model that teaches in the corpus stage and whose weights the student starts from, as in
            KroneckerBERT; None: the teacher itself, which kept more where it was measured (README).
        student: folder of a student of one's own, compressed or not, in place of one that the preset makes.
        ratio, params: size of the whole student, None: the preset's.
        max_length: tokens of an input of the task, None: the preset's, or the task's own.
        cache: folder that keeps the tokenised text for the next run; None: below `run`.
        cache_teacher: keep the teacher's answers there too; large, and worth it where texts come more than once.
        cache_bytes: most that they may take of each question, None: 20 GiB; what no longer fits is asked again.
        resume: go on with an interrupted run.
        on_progress: called with the name of the stage after each step.
        on_note: called with what is worth knowing: a stage that is left out, the size of the student,
            what would be faster.

    Raises:
        OptionError: neither task nor corpus, or the preset lacks the stage, or a size; `cache_bytes` without
            `cache_teacher`.
        DataError, CheckpointError, DistillError: data, models and preset do not fit together, or several processes are
            to share a teacher's cache; before any training.
        TrainingError: the run cannot be resumed, or has diverged.
    """
    start, folder, note = time.perf_counter(), Path(run), on_note or (lambda text: None)
    stages = _stages_of(preset, task, corpus=corpus is not None)
    for text in _left_out(preset, stages):
        note(text)
    models = open_models(teacher, base=base, student=student, task=task)
    task = models.task
    recipes = _recipes(preset, stages, task)
    device = _device(recipes)
    processes = Processes(device)
    kept = _teacher_cache(Path(cache or folder) / "teacher", cache_bytes, wanted=cache_teacher)
    if kept and not processes.alone:
        raise DistillError(
            "several processes cannot share the teacher's answers on disk: leave the teacher's cache out"
        )
    models = models.to(device)
    length = max_length or (recipes[TASK].max_length if TASK in recipes else None)
    with processes.first_then_others():
        splits = None if task is None else load_splits(task, data, models.tokenizer, max_length=length)
    record = _record(preset, recipes, models, splits, ratio=ratio, params=params, max_length=length)
    processes.once(lambda: open_run(folder, record, resume=resume))
    try:
        texts = partial(_calibration_texts, recipes, splits, corpus, models.tokenizer, Path(cache or folder) / "text")
        make = partial(_students, preset, models, recipes, texts, ratio=ratio, params=params)
        first, last = (
            make() if processes.alone or models.student is not None else _shared(make, models, processes, folder)
        )
        with processes.first_then_others():
            made = _stages(
                recipes,
                models,
                splits,
                first,
                last,
                corpus=corpus,
                text_cache=Path(cache or folder) / "text",
                tokenizer=models.tokenizer,
                folder=folder,
                teacher_cache=kept,
                on_progress=on_progress,
            )
    except CompresskitError:
        if not resume and processes.first:
            close_run(folder)
        raise
    ours, theirs = count_params(last), count_params(models.teacher)
    note(f"student: {ours:,} parameters, teacher: {theirs:,}, ratio {theirs / ours:.2f}")
    half = next((advice for recipe in recipes.values() if (advice := recipe.settings.advice())), None)
    for advice in filter(None, (kernel_advice(last, device), half)):
        note(advice)
    before, teachers = processes.once(lambda: _scores(folder, splits, last, models.teacher))
    trained = run_stages(first, made, resume=resume).eval()
    metrics = processes.once(lambda: {} if splits is None else splits.dev.metrics(trained))
    found = Distilled(
        student=trained.cpu(),
        tokenizer=models.tokenizer,
        preset=preset,
        task=task,
        metrics=metrics,
        before=before,
        teacher=teachers,
        params=ours,
        teacher_params=theirs,
        stages=tuple(read_stage(folder, stage.name, task) for stage in made),
        max_length=length,
        time_s=time.perf_counter() - start,
    )
    processes.leave()
    return found


def _teacher_cache(folder: Path, most: int | None, *, wanted: bool) -> TeacherCache | None:
    if not wanted and most is not None:
        raise OptionError("cache_bytes limits what cache_teacher keeps, which is not asked for: ask for both")
    if not wanted:
        return None
    return TeacherCache(folder) if most is None else TeacherCache(folder, max_bytes=most)


def _stages_of(preset: Preset, task: Task | None, *, corpus: bool) -> list[str]:
    """The stages that are done.

    Raises:
        OptionError: there would be none, or the preset lacks one for which there is data.
    """
    supervised = task is not None and task.has_labels
    if corpus and preset.corpus is None:
        raise OptionError(f"preset {preset.title} has no stage on plain text; leave out the corpus")
    if supervised and preset.task is None:
        raise OptionError(f"preset {preset.title} has no stage on a task; leave out the task")
    stages = [name for name, wanted in ((CORPUS, corpus), (TASK, supervised)) if wanted]
    if not stages:
        raise OptionError("there is nothing to train on: give a corpus of plain text, a task with labels, or both")
    return stages


def _left_out(preset: Preset, stages: Sequence[str]) -> list[str]:
    notes = []
    if preset.corpus is not None and CORPUS not in stages:
        notes.append("no corpus: stage 1 is left out, this is the one-stage ablation")
    if preset.task is not None and TASK not in stages:
        notes.append("no task to train on: stage 2 is left out, the student learns from plain text alone")
    return notes


def _recipes(preset: Preset, stages: Sequence[str], task: Task | None) -> dict[str, StageRecipe]:
    found: dict[str, StageRecipe] = {}
    if CORPUS in stages:
        assert preset.corpus is not None
        found[CORPUS] = preset.corpus
    if TASK in stages:
        assert preset.task is not None
        assert task is not None
        found[TASK] = preset.task.for_task(task.name)
    return found


def _device(recipes: Mapping[str, StageRecipe]) -> torch.device:
    """Where students are made and scored: where the first stage trains; Apple's GPUs lack the float64 of fits."""
    device = next(iter(recipes.values())).settings.torch_device()
    return torch.device("cpu") if device.type == "mps" else device


def _calibration_texts(
    recipes: Mapping[str, StageRecipe], splits: Splits | None, corpus: str | Path | None, tokenizer: Any, cache: Path
) -> Any:
    """Rows of token ids alone: those of the first stage."""
    if CORPUS in recipes:
        assert corpus is not None
        rows = corpus_rows(recipes[CORPUS], corpus, tokenizer, cache)
    else:
        assert splits is not None
        rows = splits.train
    return rows.select_columns([name for name in rows.column_names if name in tokenizer.model_input_names])


def _students(
    preset: Preset,
    models: Models,
    recipes: Mapping[str, StageRecipe],
    texts: Callable[[], Any],
    *,
    ratio: float | None,
    params: int | None,
) -> tuple[Model, Model]:
    """The student of the first stage and that of the last, which may be the same."""
    if models.student is not None:
        if ratio is not None or params is not None:
            raise OptionError("a student of your own has its size: leave out ratio and params")
        return models.student, models.student
    seed = next(iter(recipes.values())).settings.seed
    samples = getattr(preset.student, "calibration", 0)

    def seen(model: Model) -> Calibration | None:
        if not samples:
            return None
        made = calibrate(model, texts(), tokenizer=models.tokenizer, samples=samples, seed=seed)
        return made.with_even_words() if getattr(preset.student, "even_words", False) else made

    make = student_maker(preset, models.teacher, ratio=ratio, params=params, calibrate=seen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        last = make(models.teacher)
        if CORPUS not in recipes or models.base is models.teacher:
            return last, last
        torch.manual_seed(seed)
        return make(models.base), last


def _shared(
    make: Callable[[], tuple[Model, Model]], models: Models, processes: Processes, folder: Path
) -> tuple[Model, Model]:
    """The students that the first process makes; the others open them."""
    made = make() if processes.first else None
    same = processes.once(lambda: made is not None and made[0] is made[1])
    kinds = {"last": models.teacher} if same else {"first": models.base, "last": models.teacher}
    if made is not None:
        for name, student in zip(reversed(kinds), reversed(made), strict=False):
            student.save_pretrained(folder / STUDENTS / name)
    processes.wait()
    if made is None:
        opened = [
            type(like).from_pretrained(folder / STUDENTS / name).to(like.device, like.dtype)
            for name, like in kinds.items()
        ]
        made = opened[0], opened[-1]
    processes.wait()
    return made


def _stages(
    recipes: Mapping[str, StageRecipe],
    models: Models,
    splits: Splits | None,
    first: Model,
    last: Model,
    *,
    corpus: str | Path | None,
    text_cache: Path,
    **common: Any,
) -> list[Stage]:
    """The stages in order, each checked against its models: what does not fit is found before hours of training."""
    made: list[Stage] = []
    if CORPUS in recipes:
        assert corpus is not None
        scored = splits.dev if splits is not None and TASK not in recipes else None
        made.append(
            corpus_stage(
                recipes[CORPUS],
                teacher=models.base,
                student=first,
                corpus=corpus,
                cache=text_cache,
                dev=scored,
                **common,
            )
        )
        bind(made[-1].objective, Anatomy(first, "student"), Anatomy(models.base, "teacher"))
    if TASK in recipes:
        assert splits is not None
        target = last if first is not last else None
        made.append(task_stage(recipes[TASK], teacher=models.teacher, splits=splits, student=target, **common))
        bind(made[-1].objective, Anatomy(last, "student"), Anatomy(models.teacher, "teacher"))
    return made


def _scores(
    folder: Path, splits: Splits | None, student: Model, teacher: Model
) -> tuple[dict[str, float], dict[str, float]]:
    """Dev metrics of the untrained student and of the teacher; kept, because a resumed run needs them again."""
    if splits is None:
        return {}, {}
    path = folder / SCORED
    if not path.is_file():
        path.write_text(json.dumps([splits.dev.metrics(student), splits.dev.metrics(teacher)]), "utf-8")
    before, teachers = json.loads(path.read_text("utf-8"))
    return before, teachers


def _record(
    preset: Preset, recipes: dict[str, StageRecipe], models: Models, splits: Splits | None, **more: Any
) -> dict[str, Any]:
    """What has to be the same when a run is resumed."""
    return {
        "preset": preset.data,
        "stages": list(recipes),
        "task": None if models.task is None else dataclasses.asdict(models.task),
        "train": None if splits is None or splits.train is None else splits.train._fingerprint,
        "teacher parameters": count_params(models.teacher),
        "base parameters": count_params(models.base),
        "own student": None if models.student is None else count_params(models.student),
        **more,
    }
