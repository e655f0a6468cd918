"""Distillation: train a student, compressed or not, to do what its teacher does, layer by layer.

from compresskit.distill import DistillationTrainer, Objective, make_loss
from transformers import TrainingArguments

objective = Objective(make_loss("hidden-states"), make_loss("attention-scores", {"weight": 0.1}))
DistillationTrainer(teacher, student, objective, TrainingArguments("out"), train_dataset=data).train()

Knows no decomposition: any transformers model may be the teacher or the student.
"""

from typing import TYPE_CHECKING, Any

from compresskit.distill.cache import TeacherCache
from compresskit.distill.loss import Comparison, LayerLoss, Loss, losses, make_loss, register
from compresskit.distill.objective import (
    Objective,
    objective_from_data,
    objective_from_json,
    objective_from_toml,
)
from compresskit.distill.projections import ATTRIBUTE as PROJECTIONS

if TYPE_CHECKING:
    from compresskit.distill.progress import JsonLinesLog
    from compresskit.distill.stages import Stage, carry_over, run_stages
    from compresskit.distill.trainer import DistillationTrainer, last_checkpoint

__all__ = [
    "PROJECTIONS",
    "Comparison",
    "DistillationTrainer",
    "JsonLinesLog",
    "LayerLoss",
    "Loss",
    "Objective",
    "Stage",
    "TeacherCache",
    "carry_over",
    "last_checkpoint",
    "losses",
    "make_loss",
    "objective_from_data",
    "objective_from_json",
    "objective_from_toml",
    "register",
    "run_stages",
]

_LATE = {
    **dict.fromkeys(("DistillationTrainer", "last_checkpoint"), "trainer"),
    **dict.fromkeys(("Stage", "carry_over", "run_stages"), "stages"),
    "JsonLinesLog": "progress",
}
"""Names whose import takes transformers' Trainer along, which costs seconds."""


def __getattr__(name: str) -> Any:
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
