"""Plain fine-tuning of a model, dense or compressed, on a task."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from compresskit.distill.precision import PreciseTrainer, own_forward
from compresskit.errors import DataError
from compresskit.tasks.callbacks import OnTrainProgress, training_callbacks
from compresskit.tasks.data import load_task_data
from compresskit.tasks.features import checked_length, collator, tokenized
from compresskit.tasks.labels import align_labels
from compresskit.tasks.processes import Processes
from compresskit.tasks.runs import LOG, open_run
from compresskit.tasks.settings import TrainSettings, training_arguments
from compresskit.tasks.task import Task
from compresskit.tasks.trainer import DevSet, score_on_


@final
@dataclass(frozen=True)
class Training:
    """What a training run came to.

    Args:
        metrics: of the best checkpoint on the dev split, which the model now is.
        best_step, steps: optimiser steps until then, and in all.
        max_length: tokens of an input at most; scores with another are others.
        time_s: of this process alone, if the run was resumed.
    """

    metrics: dict[str, float]
    best_step: int
    steps: int
    epochs: float
    num_train: int
    num_dev: int
    max_length: int
    time_s: float


def finetune_(
    model: Any,
    tokenizer: Any,
    task: Task,
    data: str | Path | None,
    run: str | Path,
    settings: TrainSettings | None = None,
    *,
    max_length: int | None = None,
    resume: bool = False,
    on_progress: OnTrainProgress | None = None,
) -> Training:
    """Train the model on the task's `train` split; changes it into the best checkpoint by the primary dev metric.

    Under `torchrun` or `accelerate launch` in several processes, which share a file system.

    Args:
        model: of `model_for(task, ..., new_head=True)`.
        data: a file's folder or hub id, None for the task's own on the hub.
        run: a folder for the checkpoints and the log; kept, so that an interrupted run can be resumed.

    Raises:
        DataError: the data is missing or malformed, or does not fit the model; before training starts.
        TrainingError: the run cannot be resumed, or has diverged.
    """
    if not task.has_labels:
        raise DataError(
            f"the task {task.name} has no labels to train on: models are only scored on it; stsb is the supervised "
            "form of sts"
        )
    settings = settings or TrainSettings()
    folder, task = Path(run), align_labels(task, model.config)
    processes = Processes(settings.torch_device())
    with processes.first_then_others():
        train, dev = (load_task_data(task, data, split) for split in ("train", "dev"))
        features = [tokenized(examples, task, tokenizer, max_length=max_length) for examples in (train, dev)]
    record = {
        "task": dataclasses.asdict(task),
        "settings": dataclasses.asdict(settings),
        "max_length": max_length,
        "train": train._fingerprint,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    checkpoint = processes.once(lambda: open_run(folder, record, resume=resume))
    trainer = PreciseTrainer(
        model,
        training_arguments(settings, folder, metric=task.primary),
        data_collator=collator(tokenizer, multiple_of=8 if settings.bf16 else 1),
        train_dataset=features[0],
        eval_dataset=features[1],
        callbacks=training_callbacks(folder / LOG, settings, patience=settings.patience, on_progress=on_progress),
    )
    dev_set = DevSet(task, tokenizer, dev, features[1])
    score_on_(trainer, dev_set)
    start = time.perf_counter()
    with own_forward(model):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    state, time_s = trainer.state, time.perf_counter() - start
    metrics = processes.once(lambda: dev_set.metrics(model))
    processes.leave()
    return Training(
        metrics=metrics,
        best_step=state.best_global_step,
        steps=state.global_step,
        epochs=state.epoch,
        num_train=len(train),
        num_dev=len(dev),
        max_length=checked_length(task, tokenizer, max_length),
        time_s=time_s,
    )
