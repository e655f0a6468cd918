"""Tiny random teachers, students, batches and trainers."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

import compresskit
from compresskit.distill import DistillationTrainer, Objective, make_loss
from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import make_batch
from compresskit.distill.features import Recorder
from compresskit.distill.objective import bind
from compresskit.distill.teacher import Teacher

VOCAB, LABELS = 120, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # so that attention is far from uniform and losses far from 0
}


def bert_config(**changes: Any) -> Any:
    return transformers.BertConfig(**{**SIZES, "num_labels": LABELS, **changes})


def _config(kind: str, **changes: Any) -> Any:
    """A configuration of any family, two layers."""
    sizes = {**SIZES, "num_hidden_layers": 2, **changes}
    if kind in ("albert", "electra"):
        sizes["embedding_size"] = 24
    if kind == "roberta":
        sizes |= {"pad_token_id": 0}
    if kind == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        sizes = {{**names, "intermediate_size": "hidden_dim"}.get(k, k): v for k, v in sizes.items()}
    if kind == "gpt2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        names |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
        sizes = {names.get(k, k): v for k, v in sizes.items()} | {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        sizes |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(kind, **sizes)


FAMILIES = ("bert", "roberta", "distilbert", "electra", "albert", "gpt2", "llama")


def family(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of this family without a head, in evaluation mode."""
    torch.manual_seed(seed)
    return transformers.AutoModel.from_config(_config(kind, **changes)).eval()


TASKS = {
    "sequence": "BertForSequenceClassification",
    "regression": "BertForSequenceClassification",
    "multi-label": "BertForSequenceClassification",
    "token": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "masked-lm": "BertForMaskedLM",
    "causal-lm": "GPT2LMHeadModel",
    "pretraining": "BertForPreTraining",
}


_HEADS = {
    "regression": {"num_labels": 1},
    "question-answering": {"num_labels": 2},
    "multi-label": {"problem_type": "multi_label_classification"},
}


def model(task: str | None = None, *, seed: int = 0, **changes: Any) -> Any:
    """A model for this task, in evaluation mode; a bare BERT encoder without one."""
    torch.manual_seed(seed)
    if task == "causal-lm":
        return transformers.GPT2LMHeadModel(_config("gpt2", **changes)).eval()
    extra = {
        "regression": {"num_labels": 1},
        "question-answering": {"num_labels": 2},
        "multi-label": {"problem_type": "multi_label_classification"},
    }
    config = bert_config(**extra.get(task or "", {}), **changes)
    return getattr(transformers, TASKS[task] if task else "BertModel")(config).eval()


def compressed(teacher: Any, *, ratio: float = 1.5) -> Any:
    """A compressed copy."""
    student = copy.deepcopy(teacher)
    compresskit.compress(student, "svd", ratio=ratio)
    return student


def examples(task: str | None = None, *, count: int = 12, seed: int = 1) -> list[dict[str, Any]]:
    """Examples of different lengths, with labels of the task."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    made = []
    for _ in range(count):
        length = int(integers(3, 11, 1))
        ids = integers(4, VOCAB, length)
        example: dict[str, Any] = {"input_ids": ids.tolist()}
        if task == "sequence":
            example["labels"] = int(integers(0, LABELS, 1))
        if task == "regression":
            example["labels"] = float(torch.rand(1, generator=generator))
        if task == "multi-label":
            example["labels"] = integers(0, 2, LABELS).float().tolist()
        if task == "token":
            example["labels"] = [-100, *integers(0, LABELS, length - 1).tolist()]
        if task in ("masked-lm", "pretraining"):
            hidden = torch.rand(length, generator=generator) < 0.3
            example["labels"] = ids.masked_fill(~hidden, -100).tolist()
        if task == "pretraining":
            example["next_sentence_label"] = int(integers(0, 2, 1))
        if task == "causal-lm":
            example["labels"] = ids.tolist()
        if task == "question-answering":
            start, end = sorted(integers(0, length, 2).tolist())
            example |= {"start_positions": start, "end_positions": end}
        made.append(example)
    return made


def collate(rows: list[dict[str, Any]], *, length: int | None = None, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch padded to `length`, or to the longest row."""
    longest = length or max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], value: int) -> list[int]:
        padding = [value] * (longest - len(values))
        return padding + values if left else values + padding

    batch = {"input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows])}
    batch["attention_mask"] = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows])
    for name in rows[0].keys() - {"input_ids"}:
        per_token = isinstance(rows[0][name], list) and isinstance(rows[0][name][0], int)
        padding = -100 if name == "labels" else 0
        batch[name] = torch.tensor([pad(row[name], padding) if per_token else row[name] for row in rows])
    return batch


def objective(*names: str, **weights: float) -> Objective:
    return Objective(*(make_loss(name, {"weight": weights.get(name.replace("-", "_"), 1.0)}) for name in names))


def evaluate(goal: Objective, teacher: Any, student: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The objective on one batch, without a trainer."""
    ours, theirs = Anatomy(student, "student"), Anatomy(teacher, "teacher")
    bound = bind(goal, ours, theirs)
    batch = make_batch(inputs, causal=ours.causal, shifted=ours.task == "causal-lm")
    with Recorder(ours, bound.student_features()) as recorder:
        outputs = student(**batch.inputs)
    recorder.take_outputs(outputs)
    answers = Teacher(theirs, bound.teacher_features())(batch)
    torch.manual_seed(3)
    return bound(recorder.features, answers, batch, batch.counts(), bound.make_projections())


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def trainer(
    teacher: Any,
    student: Any,
    goal: Objective,
    folder: Path,
    *,
    data: list[dict[str, Any]] | None = None,
    callbacks: Any = (),
    cache: Any = None,
    eval_data: Any = None,
    **changes: Any,
) -> DistillationTrainer:
    return DistillationTrainer(
        teacher,
        student,
        goal,
        arguments(folder, **changes),
        train_dataset=examples() if data is None else data,
        eval_dataset=eval_data,
        data_collator=collate,
        callbacks=callbacks,
        cache=cache,
    )
