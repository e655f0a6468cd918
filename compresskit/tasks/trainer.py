"""transformers' Trainer for tasks: batches of alike length, and the task's own metrics as its evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import transformers

from compresskit.errors import DataError, TrainingError
from compresskit.tasks.data import Examples
from compresskit.tasks.evaluate import predict
from compresskit.tasks.features import Features
from compresskit.tasks.metrics import predictions_of, score
from compresskit.tasks.task import Task

POOL = 50
"""Batches that are drawn together and sorted by length."""


@final
@dataclass(frozen=True)
class DevSet:
    """What a model in training is scored on."""

    task: Task
    tokenizer: Any
    examples: Examples
    features: Features
    batch_size: int = 32

    def metrics(self, model: Any) -> dict[str, float]:
        """The task's metrics of a model, its primary one first."""
        outputs = predict(model, self.tokenizer, self.task, self.features, batch_size=self.batch_size)
        return score(self.task, predictions_of(self.task, outputs, self.features, self.examples), self.examples)


@final
class BucketSampler(torch.utils.data.Sampler[int]):
    """A random order in which neighbours are alike in length, so that batches need little padding.

    Rows are shuffled, cut into pools of some batches, sorted by length in each, and the batches shuffled. The order
    depends on seed and epoch alone, so a resumed run sees what the interrupted one would have seen.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * self._epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        size = self._batch_size * POOL
        pools = [sorted(order[i : i + size], key=lambda j: -self._lengths[j]) for i in range(0, len(order), size)]
        rows = [row for pool in pools for row in pool]
        full = len(rows) - len(rows) % self._batch_size  # a short batch stays the last
        batches = [rows[i : i + self._batch_size] for i in range(0, full, self._batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[i]
        yield from rows[full:]


def score_on_(trainer: Any, dev: DevSet | None) -> None:
    """Make a Trainer of any class score itself on a task and draw batches of alike length. Changes the trainer.

    Without a dev set it only draws such batches, and is never scored.

    `metric_for_best_model` may then be any metric of the task. The training data needs a column `length`, which
    `tokenized` and `load_corpus` write. Each process of a distributed run scores the whole dev split. Takes away the
    callbacks that print.
    """
    if dev is not None:
        trainer.evaluate = partial(_evaluate, trainer, dev)
    trainer._get_train_sampler = partial(_bucket_sampler, trainer)
    for callback in (transformers.trainer_callback.PrinterCallback, transformers.trainer_callback.ProgressCallback):
        trainer.remove_callback(callback)


def _evaluate(
    trainer: Any, dev: DevSet, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
) -> dict[str, float]:
    """In place of `Trainer.evaluate`: the metrics, logged, and the callbacks told of.

    Raises:
        TrainingError: the model's output is not finite.
    """
    try:
        found = dev.metrics(trainer.model)
    except DataError as error:
        step = trainer.state.global_step
        raise TrainingError(f"after step {step} {error}: training has diverged; lower the learning rate") from error
    metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
    trainer.log(dict(metrics))  # it adds the epoch
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def _bucket_sampler(trainer: Any, train_dataset: Any = None) -> BucketSampler:
    rows = trainer.train_dataset if train_dataset is None else train_dataset
    lengths = list(rows["length"][:])  # row by row would take seconds
    together = trainer.args.train_batch_size * trainer.args.world_size  # what all processes read at a time: alike, too
    return BucketSampler(lengths, together, trainer.args.seed)
