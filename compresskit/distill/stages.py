"""Several trainings one after the other, each with its own teacher, data, objective and arguments: a recipe."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from compresskit.distill.cache import TeacherCache
from compresskit.distill.objective import Objective
from compresskit.distill.precision import own_forward
from compresskit.distill.trainer import DistillationTrainer
from compresskit.errors import DistillError

DONE = "student.safetensors"
"""In the output folder of a stage that is done: the student's weights at its end."""


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training.

    Args:
        name: for messages.
        teacher, objective, args, train_dataset, eval_dataset, data_collator, processing_class, compute_metrics,
            callbacks, cache: of `DistillationTrainer`; each stage has an output folder of its own.
        set_up: changes the trainer before it trains, as `compresskit.tasks.score_on_` does.
        prepare: makes this stage's student of the last one's, as when a task's head replaces that of pre-training; none
            goes on with the same model.
    """

    name: str
    teacher: PreTrainedModel
    objective: Objective
    args: TrainingArguments
    train_dataset: Any
    eval_dataset: Any = None
    data_collator: Callable[..., Any] | None = None
    processing_class: Any = None
    compute_metrics: Callable[..., dict[str, float]] | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    cache: TeacherCache | None = None
    set_up: Callable[[DistillationTrainer], None] | None = None
    prepare: Callable[[PreTrainedModel], PreTrainedModel] | None = None

    @property
    def done(self) -> Path:
        return Path(self.args.output_dir) / DONE


def run_stages(student: PreTrainedModel, stages: Sequence[Stage], *, resume: bool = False) -> PreTrainedModel:
    """Train the student through all stages and return that of the last one. In place where a stage does not prepare.

    Args:
        resume: take the result of stages that are done, and go on in the first that is not at its newest checkpoint;
            teachers, data and student must be those of the run that is resumed.

    Raises:
        DistillError: two stages write into one folder, or models and objective of a stage do not fit together.
    """
    folders = [os.path.realpath(stage.args.output_dir) for stage in stages]
    if len(set(folders)) < len(folders):
        raise DistillError(f"each stage needs an output folder of its own; these have {', '.join(folders)}")
    for stage in stages:
        student = student if stage.prepare is None else stage.prepare(student)
        if resume and stage.done.exists():
            load_model(student, stage.done)
        else:
            _train(student, stage, resume=resume)
    return student


def _train(student: PreTrainedModel, stage: Stage, *, resume: bool) -> None:
    trainer = DistillationTrainer(
        stage.teacher,
        student,
        stage.objective,
        stage.args,
        train_dataset=stage.train_dataset,
        eval_dataset=stage.eval_dataset,
        data_collator=stage.data_collator,
        processing_class=stage.processing_class,
        compute_metrics=stage.compute_metrics,
        callbacks=stage.callbacks,
        cache=stage.cache,
    )
    if stage.set_up is not None:
        stage.set_up(trainer)
    with own_forward(student):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        partial = stage.done.with_suffix(".partial")
        save_model(student, str(partial))
        os.replace(partial, stage.done)
    trainer.accelerator.wait_for_everyone()


def carry_over(source: PreTrainedModel, target: PreTrainedModel) -> PreTrainedModel:
    """`target` with the weights of `source`'s encoder; its head stays as it was. In place.

    For `Stage.prepare`: the two have one compressed encoder under different heads.

    Raises:
        DistillError: the encoders do not have the same parameters.
    """
    ours, theirs = target.base_model.state_dict(), source.base_model.state_dict()
    common = {name: tensor for name, tensor in theirs.items() if name in ours and ours[name].shape == tensor.shape}
    missing = sorted(set(ours) - set(common) - _poolers(ours))
    if missing:
        raise DistillError(f"the encoders differ in {len(missing)} tensors: {', '.join(missing[:3])}, ...")
    target.base_model.load_state_dict(common, strict=False)
    return target


def _poolers(names: Any) -> set[str]:
    """Only some heads have a pooler below them."""
    return {name for name in names if name.startswith("pooler.")}
