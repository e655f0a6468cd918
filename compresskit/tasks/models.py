"""Models and tokenizers for a task, from folders."""

from pathlib import Path
from typing import Any

import torch
import transformers

from compresskit.errors import CheckpointError, DataError
from compresskit.hub import load_model, load_with_head, tensor_names
from compresskit.tasks.labels import align_labels
from compresskit.tasks.task import Task
from compresskit.tasks.words import predicts

AUTO_CLASSES: dict[str, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "similarity": transformers.AutoModel,
    "text": transformers.AutoModel,
}
Model = Any
"""A transformers PreTrainedModel, which has no types."""


def model_for(
    task: Task, folder: str | Path, *, new_head: bool = False, dtype: str | torch.dtype | None = None
) -> Model:
    """The model in a folder, dense or compressed, with the head that the task needs, in eval mode.

    Args:
        folder: of a model (`compresskit.hub.resolve` finds that of a hub id).
        new_head: make a head from torch's generator where there is none, or one for other labels, and write the
            task's labels into the config. False: the model must have been trained for such a task.
        dtype: None or "auto": as the checkpoint says.

    Raises:
        CheckpointError: the folder is not complete, or (without new_head) has no head for this kind of task.
        DataError: a new head, but the task does not name its labels (`with_labels_of` reads them from the data).
    """
    if task.kind == "language-modelling":
        model = _word_model(folder, dtype)
    else:
        model = _model_with_head(task, folder, new_head=new_head, dtype=dtype)
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = tokenizer_for(folder).pad_token_id  # decoders find the last token by it
    return model


def _word_model(folder: str | Path, dtype: str | torch.dtype | None) -> Model:
    """The model as its config says, which must be one that predicts words."""
    model = load_model(folder, dtype=dtype)
    if predicts(model) is None:
        raise CheckpointError(
            f"{folder} holds a {type(model).__name__}, which predicts no words: causal or masked language models do"
        )
    return model


def _model_with_head(task: Task, folder: str | Path, *, new_head: bool, dtype: str | torch.dtype | None) -> Model:
    changes = _head_config(task, folder) if new_head else {}
    model, made = load_with_head(
        folder, AUTO_CLASSES[task.kind], changes=changes, dtype=dtype, new_head=new_head or task.kind == "similarity"
    )
    if made and not new_head:  # an encoder of sentences without a pooler: nobody asks it
        model.base_model.pooler = None
    return model


def pretrained(folder: str | Path) -> Model:
    """The model in a folder with the heads of its pre-training, as far as their weights are there, in eval mode.

    BERT's next-sentence head counts even where the config names the masked language model alone.

    Raises:
        CheckpointError: the folder is not complete.
    """
    if any(name.endswith("seq_relationship.weight") for name in tensor_names(folder)):
        return load_with_head(folder, transformers.AutoModelForPreTraining)[0]
    return load_model(folder)


def _head_config(task: Task, folder: str | Path) -> dict[str, Any]:
    """What a config says of a head for this task; a head for the same labels in another order keeps its order."""
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression", "id2label": {0: "score"}, "label2id": {"score": 0}}
    if not task.has_named_labels:
        return {}
    if not task.label_names:
        raise DataError(f"the task {task.name} does not name its labels; with_labels_of reads them from the data")
    names = task.label_names
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if {str(name) for name in config.id2label.values()} == set(names):
        names = align_labels(task, config).label_names
    problem = {"problem_type": "single_label_classification"} if task.kind == "classification" else {}
    return {
        **problem,
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def tokenizer_for(folder: str | Path) -> Any:
    """The tokenizer in a folder, with a padding token (the end of text if it has none), padding on the right.

    Its `model_max_length` is at most what the model in the folder has positions for.

    Raises:
        CheckpointError: there is none, or it cannot be opened.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"there is no tokenizer in {folder} that transformers can open: {error}") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):  # what transformers makes up without any file
        raise CheckpointError(f"there is no tokenizer in {folder}; copy the files of the original model's into it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has neither a padding token nor an end of text")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(folder) or tokenizer.model_max_length)
    return tokenizer


def _positions(folder: str | Path) -> int | None:
    """Tokens that a model has positions for; None: there is no config, or it does not say."""
    if not (Path(folder) / "config.json").is_file():
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):  # opening the model says why
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # DeBERTa and others have -1: any number
        return None
    after_padding = "roberta" in config.model_type or config.model_type in ("camembert", "mpnet")
    return positions - 1 - (config.pad_token_id or 0) if after_padding else positions
