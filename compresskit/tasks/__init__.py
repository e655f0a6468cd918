"""Tasks: their data, their models, their metrics, and plain fine-tuning.

import compresskit.tasks as tasks

task = tasks.find_task("sst2")
model, tokenizer = tasks.model_for(task, folder), tasks.tokenizer_for(folder)
tasks.evaluate(model, tokenizer, task, "glue")  # {"accuracy": ...}
"""

import compresskit.tasks.definitions  # noqa: F401 - registers the tasks
from compresskit.tasks.altered import AlteredTexts
from compresskit.tasks.callbacks import OnTrainProgress, ProgressCallback, TrainProgress, training_callbacks
from compresskit.tasks.corpus import load_corpus
from compresskit.tasks.data import Examples, load_task_data, with_labels_of
from compresskit.tasks.evaluate import Evaluation, evaluate, predict, run_evaluation
from compresskit.tasks.features import Collator, Features, collator, tokenized
from compresskit.tasks.finetune import Training, finetune_
from compresskit.tasks.labels import align_labels
from compresskit.tasks.metrics import agreement, predictions_of, score
from compresskit.tasks.models import model_for, pretrained, tokenizer_for
from compresskit.tasks.pretraining import NextWordsCollator, PretrainingCollator, SentencePairs
from compresskit.tasks.processes import Processes, agreed, is_first
from compresskit.tasks.runs import close_run, interrupted_run, open_run
from compresskit.tasks.settings import TrainSettings, training_arguments
from compresskit.tasks.task import (
    KINDS,
    HubSource,
    Task,
    custom_task,
    find_task,
    register_task,
    tasks,
    with_columns,
)
from compresskit.tasks.trainer import BucketSampler, DevSet, score_on_

__all__ = [
    "KINDS",
    "AlteredTexts",
    "BucketSampler",
    "Collator",
    "DevSet",
    "Evaluation",
    "Examples",
    "Features",
    "HubSource",
    "NextWordsCollator",
    "OnTrainProgress",
    "PretrainingCollator",
    "Processes",
    "ProgressCallback",
    "SentencePairs",
    "Task",
    "TrainProgress",
    "TrainSettings",
    "Training",
    "agreed",
    "agreement",
    "align_labels",
    "close_run",
    "collator",
    "custom_task",
    "evaluate",
    "find_task",
    "finetune_",
    "interrupted_run",
    "is_first",
    "load_corpus",
    "load_task_data",
    "model_for",
    "open_run",
    "predict",
    "predictions_of",
    "pretrained",
    "register_task",
    "run_evaluation",
    "score",
    "score_on_",
    "tasks",
    "tokenized",
    "tokenizer_for",
    "training_arguments",
    "training_callbacks",
    "with_columns",
    "with_labels_of",
]
