"""What training says of itself: progress for a bar, and a stop when the loss is no number."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import transformers
from torch import nn

from compresskit.distill import JsonLinesLog
from compresskit.errors import TrainingError
from compresskit.tasks.settings import TrainSettings


@final
@dataclass(frozen=True)
class TrainProgress:
    """Where training is.

    Args:
        step, total: optimiser steps.
        epoch: passes over the data so far, a fraction.
        loss: mean since the last entry of the log; None before the first.
        examples_per_s: of training alone, over the last steps.
        metrics: of the dev split at the last score.
        terms: of the loss, if it has several; they add up to it.
    """

    step: int
    total: int
    epoch: float
    loss: float | None
    examples_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)


OnTrainProgress = Callable[[TrainProgress], None]


@final
class ProgressCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells `on_progress` of each step, adds `examples_per_s` to the log, stops at a lost loss.

    Goes before `JsonLinesLog` among the callbacks, so that this has the speed.

    Raises:
        TrainingError: the loss is NaN or infinite.
    """

    def __init__(self, on_progress: OnTrainProgress | None = None) -> None:
        self._on_progress = on_progress
        self._loss: float | None = None
        self._metrics: dict[str, float] = {}
        self._terms: dict[str, float] = {}
        self._speed = 0.0
        self._step_began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._loss is not None and not math.isfinite(self._loss):  # it is in the log by now
            raise TrainingError(
                f"the loss is {self._loss} at step {state.global_step}: training has diverged. A lower learning rate "
                f"(now {args.learning_rate:g}) or more warmup may help"
            )
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        speed = examples / (time.perf_counter() - self._step_began)
        self._speed = speed if self._speed == 0 else 0.9 * self._speed + 0.1 * speed
        if state.global_step >= state.max_steps:
            control.should_log = True  # short runs have a log too
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self._loss = float(logs["loss"])
            self._terms = {name[5:]: value for name, value in logs.items() if name.startswith("loss_")}
            logs["examples_per_s"] = round(self._speed, 1)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._metrics = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        self._show(state)

    def _show(self, state: Any) -> None:
        if self._on_progress is not None and state.is_world_process_zero:
            self._on_progress(
                TrainProgress(
                    state.global_step,
                    state.max_steps,
                    state.epoch or 0.0,
                    self._loss,
                    self._speed,
                    self._metrics,
                    self._terms,
                )
            )


@final
class Dropout(transformers.TrainerCallback):  # type: ignore[misc]
    """Another dropout in all modules of the model while it trains."""

    def __init__(self, p: float) -> None:
        self._p = p
        self._own: dict[nn.Dropout, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._own = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        for module in self._own:
            module.p = self._p

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module, p in self._own.items():
            module.p = p


def training_callbacks(
    log: Path, settings: TrainSettings, *, patience: int | None = None, on_progress: OnTrainProgress | None = None
) -> list[transformers.TrainerCallback]:
    """What every training of ours has: progress, a log, dropout as the settings say.

    Args:
        patience: stop early if so many scores in a row were worse; None: there are no scores, or never.
    """
    dropout = [] if settings.dropout is None else [Dropout(settings.dropout)]
    stopping = [] if patience is None else [transformers.EarlyStoppingCallback(patience)]
    return [ProgressCallback(on_progress), JsonLinesLog(log), *dropout, *stopping]
