"""Distillation on plain text without labels, and what it does to a sentence encoder. Imports torch: import it late."""

import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.embeddings import StsB, agreement
from compresskit.distill import PROJECTIONS, DistillationTrainer, Objective
from compresskit.tasks import BucketSampler, TrainSettings, collator, load_corpus, score_on_, training_arguments

BATCH = 64
"""Texts of a forward pass that only measures."""
CURVE = "curve"
"""Marks the entries of the trainer's log, and so of its checkpoints, that hold what was measured on the way."""
EMBEDDING = "sentence-embeddings"
"""The loss whose learned projection, if it has one, belongs to a narrower student."""
Rows = Any
"""A `datasets.Dataset` of `load_corpus`."""


def read_corpus(
    path: Path, tokenizer: Any, cache: Path, *, max_length: int, unit: Any, held_out: int
) -> tuple[Rows, Rows]:
    """Texts to train on, and every so many-th text, at most `held_out`, that is not trained on."""
    rows = load_corpus(path, tokenizer, cache=cache, max_length=max_length, unit=unit)
    step = max(len(rows) // held_out, 2)
    kept = [i for i in range(len(rows)) if i % step]
    return rows.select(kept), rows.select(list(range(0, len(rows), step))[:held_out])


@final
class Measure:
    """What is left of a sentence encoder, by several measures.

    Args:
        dense: the model that the others are compared with.
        held_out: texts that are not trained on.
        sts_b: pairs with human scores, or None.
    """

    def __init__(self, dense: nn.Module, tokenizer: Any, held_out: Rows, sts_b: StsB | None) -> None:
        self._tokenizer, self._held_out, self._sts_b = tokenizer, held_out, sts_b
        self._dense = list(self._states(dense))
        self._embedded = torch.cat([_pooled(*states) for states in self._dense])

    @torch.inference_mode()
    def __call__(self, model: nn.Module, projection: nn.Module | None = None) -> dict[str, float]:
        """STS-B dev Spearman; on the held-out texts, where embeddings are as long, their agreement with the dense ones;
        without a projection also the squared error of the last hidden states relative to the squares of the dense ones.

        Args:
            projection: of the last hidden states to the dense model's size.
        """
        training = model.training
        encoder = model.eval() if projection is None else _Projected(model.eval(), projection)
        states = list(self._states(encoder))
        embedded = torch.cat([_pooled(*state) for state in states])
        found = {} if self._sts_b is None else {"sts_b": self._sts_b.spearman(encoder, self._tokenizer)}
        if embedded.shape == self._embedded.shape:
            if projection is None:  # one that was learned for directions alone says nothing of states
                found["hidden_error"] = _relative_error([s for s, _ in states], self._dense)
            found |= agreement(embedded, self._embedded)
        model.train(training)
        return found

    def _states(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Last hidden states (batch, time, hidden) and mask (batch, time) of the held-out texts, batch by batch."""
        collate, order = collator(self._tokenizer), sorted(self._held_out, key=lambda row: row["length"])
        device = next(model.parameters()).device
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                batch = {name: t.to(device) for name, t in collate(order[start : start + BATCH]).items()}
                yield model(**batch).last_hidden_state.cpu(), batch["attention_mask"].bool().cpu()


@final
class _Projected(nn.Module):
    """An encoder whose last hidden states pass a projection."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.projection(self.encoder(**inputs).last_hidden_state))


def _pooled(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def _relative_error(ours: Sequence[Tensor], dense: Sequence[tuple[Tensor, Tensor]]) -> float:
    pairs = [(s[mask], t[mask]) for s, (t, mask) in zip(ours, dense, strict=True)]
    error = sum(float((s - t).square().sum()) for s, t in pairs)
    return error / sum(float(t.square().sum()) for _, t in pairs)


@final
@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        curve: step, tokens and the loss so far, and what was measured then.
        resumed_at: the step at which the last process went on, 0 if it did everything.
        projection_params: of the learned map to the dense model's size that was measured with, beside the student's.
    """

    curve: list[dict[str, float]]
    steps: int
    tokens: int
    texts: int
    tokens_per_s: float
    resumed_at: int
    projection_params: int


def train_(
    student: nn.Module,
    teacher: nn.Module,
    objective: Objective,
    rows: Rows,
    tokenizer: Any,
    folder: Path,
    settings: TrainSettings,
    measure: Measure,
) -> Trained:
    """Distill on texts of alike length, from the newest checkpoint in `folder` if there is one. Changes the student.

    No dropout: the teacher has none, so it would only be noise. Attention is computed from plain products, because
    the backward pass of PyTorch's fused attention is slow on a processor.
    """
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    every = settings.eval_steps or 100
    plain = {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    saving = {"save_strategy": "steps", "save_steps": every, "save_total_limit": 1, "logging_steps": min(every, 10)}
    curve = _Curve(every, measure, rows, settings)
    trainer = DistillationTrainer(
        teacher,
        student,
        objective,
        training_arguments(settings, folder, metric="none", **plain, **saving),
        train_dataset=rows,
        data_collator=collator(tokenizer, multiple_of=8 if settings.bf16 else 1),
        callbacks=[curve],
    )
    score_on_(trainer, None)  # only draws batches of alike length; the curve has the scores
    with sdpa_kernel(SDPBackend.MATH):
        trainer.train(resume_from_checkpoint=True)
    log = trainer.state.log_history
    return Trained(
        curve=[entry[CURVE] for entry in log if CURVE in entry],
        steps=trainer.state.global_step,
        tokens=curve.tokens(trainer.state.global_step),
        texts=len(rows),
        tokens_per_s=statistics.median([entry["tokens_per_s"] for entry in log if "tokens_per_s" in entry]),
        resumed_at=curve.began,
        projection_params=sum(p.numel() for p in curve.projection.parameters()) if curve.projection else 0,
    )


def close(folder: Path) -> None:
    """Remove the checkpoints of a training that is complete."""
    shutil.rmtree(folder)


@final
class _Curve(TrainerCallback):
    """Measures the student every so many steps and writes that into the log, which checkpoints carry along."""

    def __init__(self, every: int, measure: Measure, rows: Rows, settings: TrainSettings) -> None:
        self._every, self._measure, self._settings = every, measure, settings
        self._lengths = rows.select_columns("length")[:]["length"]  # row by row would take seconds
        self._sampler = BucketSampler(self._lengths, settings.batch_size, settings.seed)
        self.began = 0
        self.projection: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.began = state.global_step
        self.projection = dict(getattr(model, PROJECTIONS, nn.ModuleDict()).items()).get(EMBEDDING)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        losses = [entry["loss"] for entry in state.log_history[-self._every :] if "loss" in entry]
        found = {
            "step": state.global_step,
            "tokens": self.tokens(state.global_step),
            **self._measure(model, self.projection),
        }
        state.log_history.append({CURVE: {**found, **({"loss": losses[-1]} if losses else {})}})

    def tokens(self, steps: int) -> int:
        """Real tokens in the first steps."""
        seen, epoch, size = 0, 0, self._settings.batch_size
        while steps > 0:
            self._sampler.set_epoch(epoch)
            order = list(self._sampler)
            seen += sum(self._lengths[i] for i in order[: steps * size])
            steps, epoch = steps - math.ceil(len(order) / size), epoch + 1
        return seen
