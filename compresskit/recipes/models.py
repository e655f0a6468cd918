"""The models of a distillation, opened and checked against each other before anything is computed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from compresskit.distill.anatomy import Anatomy
from compresskit.errors import CheckpointError, DistillError
from compresskit.hub import load_model, read_map, resolve, tensor_names
from compresskit.tasks import Task, align_labels, model_for, pretrained, tokenizer_for

Model = Any


@final
@dataclass(frozen=True, kw_only=True)
class Models:
    """What a distillation starts from.

    Args:
        teacher: with the task's head; without a task the encoder alone.
        folder: of the teacher.
        base: teacher of the corpus stage, the teacher itself unless another was given.
        student: an own student with the task's head, None: it is made of the teacher.
        task: with its labels in the teacher's order; None: there is none.
    """

    teacher: Model
    folder: Path
    tokenizer: Any
    base: Model
    student: Model | None
    task: Task | None

    def to(self, device: torch.device) -> "Models":
        """The same models there. Students are made and fitted where their teacher is."""
        for model in (self.teacher, self.base, self.student):
            if model is not None:
                model.to(device)
        return self


def open_models(
    teacher: str | Path, *, base: str | Path | None, student: str | Path | None, task: Task | None
) -> Models:
    """Open teacher, pre-trained model and student, and check that they fit together.

    Raises:
        CheckpointError: a folder is no complete model, the teacher has no head for the task or is compressed.
        DataError: the teacher's head is for other labels.
        DistillError: the tokenizers differ.
    """
    folder = resolve(str(teacher), None)
    if student is None and read_map(folder) is not None:
        raise CheckpointError(f"the teacher {folder} is compressed; a student is made of a dense teacher")
    opened = load_model(folder).base_model if task is None else model_for(task, folder, dtype=torch.float32)
    if task is not None:
        task = align_labels(task, opened.config)
    tokenizer = tokenizer_for(folder)
    other = folder if base is None else resolve(str(base), None)
    if base is not None:
        _check_tokenizer(tokenizer, folder, other, "the pre-trained model")
    own = None if student is None else _student(resolve(str(student), None), opened, folder, tokenizer, task)
    return Models(
        teacher=opened.float(),
        folder=folder,
        tokenizer=tokenizer,
        base=opened if base is None else pretrained(other).float(),
        student=own,
        task=task,
    )


def _check_tokenizer(tokenizer: Any, folder: Path, other: Path, who: str) -> None:
    ours, theirs = tokenizer.get_vocab(), tokenizer_for(other).get_vocab()
    if ours != theirs:
        word = min((w for w in {**ours, **theirs} if ours.get(w) != theirs.get(w)), key=lambda w: (ours.get(w, 0), w))
        raise DistillError(
            f"the tokenizer of {who}, {other}, is not that of the teacher, {folder}: {word!r} is number "
            f"{theirs.get(word)}, there {ours.get(word)}; all models read the same input_ids"
        )


def _student(folder: Path, teacher: Model, teacher_folder: Path, tokenizer: Any, task: Task | None) -> Model:
    """A student of one's own; a head that it lacks is the teacher's."""
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        _check_tokenizer(tokenizer, teacher_folder, folder, "the student")
    if task is None:
        return load_model(folder).base_model.float()
    student = model_for(task, folder, new_head=task.kind != "similarity", dtype=torch.float32)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise DistillError(
            f"the student {folder} knows {student.config.vocab_size} words, the teacher "
            f"{teacher.config.vocab_size}; they need the same tokenizer"
        )
    stored = set(tensor_names(folder))
    with torch.no_grad():
        theirs = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            if name not in stored and name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
    return student


def has_words(student: Model, teacher: Model) -> bool:
    """Whether both predict masked words."""
    return all(Anatomy(m, "model").task in ("masked-lm", "pretraining") for m in (student, teacher))


def has_next_words(student: Model, teacher: Model) -> bool:
    """Whether both predict the next word."""
    return all(Anatomy(m, "model").task == "causal-lm" for m in (student, teacher))


def has_sentences(student: Model, teacher: Model) -> bool:
    """Whether both predict if one text follows another."""
    return all(Anatomy(m, "model").task == "pretraining" for m in (student, teacher))
