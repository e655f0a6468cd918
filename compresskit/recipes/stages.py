"""From a preset and opened models to the stages that `run_stages` runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from transformers import TrainerCallback

from compresskit.distill import Objective, Stage, TeacherCache, carry_over, make_loss
from compresskit.errors import DataError
from compresskit.recipes.definition import StageRecipe
from compresskit.recipes.models import has_next_words, has_sentences, has_words
from compresskit.tasks import (
    AlteredTexts,
    DevSet,
    Examples,
    Features,
    NextWordsCollator,
    PretrainingCollator,
    SentencePairs,
    Task,
    TrainProgress,
    agreed,
    collator,
    load_corpus,
    load_task_data,
    score_on_,
    tokenized,
    training_arguments,
    training_callbacks,
)

Model = Any
OnStage = Callable[[str, TrainProgress], None]
"""Called with the name of the stage after each step and each score."""

LOG = "log.jsonl"
CORPUS, TASK = "corpus", "task"
SAVE_STEPS = 500
"""A stage without scores keeps a checkpoint this often, unless `eval_steps` says another number."""
SAVE_S = 300.0
"""Besides, no stage loses more than this many seconds."""


@final
@dataclass(frozen=True, kw_only=True)
class Splits:
    """Data of a task as token ids; no training data where a task has none to train on.

    Args:
        train: features, None for a task that is only scored.
        dev: to score on.
    """

    train: Features | None
    dev: DevSet


def load_splits(task: Task, data: str | Path | None, tokenizer: Any, *, max_length: int | None) -> Splits:
    """Read and check the data of a task.

    Raises:
        DataError: missing or malformed; names file and line.
    """
    train = load_task_data(task, data, "train") if task.has_labels else None
    dev: Examples = load_task_data(task, data, "dev")
    make = partial(tokenized, task=task, tokenizer=tokenizer, max_length=max_length)
    return Splits(train=None if train is None else make(train), dev=DevSet(task, tokenizer, dev, make(dev)))


def corpus_stage(
    recipe: StageRecipe,
    *,
    teacher: Model,
    student: Model,
    tokenizer: Any,
    corpus: str | Path,
    folder: Path,
    cache: Path,
    dev: DevSet | None,
    teacher_cache: TeacherCache | None = None,
    on_progress: OnStage | None = None,
) -> Stage:
    """Stage 1: plain text, no labels but those that the text has itself.

    Args:
        student: only looked at, for its heads.
        cache: folder for the tokenised text.
        dev: scores the student, and its best checkpoint is taken; None: the last one is.

    Raises:
        DataError: no text there.
    """
    words, sentences = recipe.mlm and has_words(student, teacher), recipe.nsp and has_sentences(student, teacher)
    following = recipe.clm and has_next_words(student, teacher)
    rows = corpus_rows(recipe, corpus, tokenizer, cache, halved=sentences)
    if sentences:
        rows = SentencePairs(rows, seed=recipe.settings.seed)
    collate: Any = collator(tokenizer, multiple_of=8 if recipe.settings.bf16 else 1)
    if words:
        collate = PretrainingCollator(collate, recipe.settings.seed)
    elif following:
        collate = NextWordsCollator(collate)
    heads = {"task": words or following, "next-sentence": words and sentences}
    more = [make_loss(name) for name, there in heads.items() if there]
    unscored: dict[str, Any] = {
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
        "save_strategy": "steps",
        "save_steps": recipe.settings.eval_steps or SAVE_STEPS,
    }
    return Stage(
        name=CORPUS,
        teacher=teacher,
        objective=Objective(*recipe.objective.losses, *more),
        args=training_arguments(
            recipe.settings,
            folder / CORPUS,
            metric="none" if dev is None else dev.task.primary,
            **(unscored if dev is None else {}),
        ),
        train_dataset=rows,
        eval_dataset=None if dev is None else dev.features,
        data_collator=collate,
        callbacks=_callbacks(CORPUS, recipe, folder, on_progress, scored=dev is not None),
        cache=teacher_cache,
        set_up=partial(score_on_, dev=dev),
    )


def corpus_rows(recipe: StageRecipe, corpus: str | Path, tokenizer: Any, cache: Path, *, halved: bool = False) -> Any:
    """Pieces of plain text as token ids.

    Args:
        halved: half as long, two of them make an example.

    Raises:
        DataError: no text there.
    """
    length = min(recipe.max_length or 128, tokenizer.model_max_length)
    return load_corpus(corpus, tokenizer, cache=cache, max_length=(length + 1) // 2 if halved else length)


def task_stage(
    recipe: StageRecipe,
    *,
    teacher: Model,
    tokenizer: Any,
    splits: Splits,
    folder: Path,
    student: Model | None = None,
    teacher_cache: TeacherCache | None = None,
    on_progress: OnStage | None = None,
) -> Stage:
    """Stage 2: the task, with the teacher that was trained on it; the best checkpoint of the dev split is taken.

    Args:
        student: takes over the encoder of the stage before; None: the same student goes on.

    Raises:
        DataError: a task without labels.
    """
    task = splits.dev.task
    if splits.train is None:
        raise DataError(f"the task {task.name} has no labels to train on: models are only scored on it")
    train = splits.train
    if recipe.altered_copies:
        train = AlteredTexts(
            train,
            teacher.get_input_embeddings(),
            tokenizer,
            copies=recipe.altered_copies,
            share=recipe.altered_share,
            seed=recipe.settings.seed,
        )
    return Stage(
        name=TASK,
        teacher=teacher,
        objective=recipe.objective,
        args=training_arguments(recipe.settings, folder / TASK, metric=task.primary),
        train_dataset=train,
        eval_dataset=splits.dev.features,
        data_collator=collator(tokenizer, multiple_of=8 if recipe.settings.bf16 else 1),
        callbacks=_callbacks(TASK, recipe, folder, on_progress, scored=True),
        cache=teacher_cache,
        set_up=partial(score_on_, dev=splits.dev),
        prepare=None if student is None else partial(_carried, student),
    )


def _carried(target: Model, source: Model) -> Model:
    return carry_over(source, target)


def _callbacks(
    name: str, recipe: StageRecipe, folder: Path, on_progress: OnStage | None, *, scored: bool
) -> tuple[TrainerCallback, ...]:
    settings, shown = recipe.settings, None if on_progress is None else partial(on_progress, name)
    patience = settings.patience if scored else None
    return (
        *training_callbacks(folder / name / LOG, settings, patience=patience, on_progress=shown),
        SaveByClock(),
    )


@final
class SaveByClock(TrainerCallback):  # type: ignore[misc]
    """Keeps a checkpoint at least every `every_s` seconds, whatever the steps say: what an interruption may cost."""

    def __init__(self, every_s: float = SAVE_S) -> None:
        self._every_s = every_s
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if agreed(time.monotonic() - self._saved > self._every_s, args):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
