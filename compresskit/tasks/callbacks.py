"""What training says of itself: a JSON-lines log, progress for a bar, and a stop when the loss is no number."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import transformers

from compresskit.errors import TrainingError


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
    """

    step: int
    total: int
    epoch: float
    loss: float | None
    examples_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)


OnTrainProgress = Callable[[TrainProgress], None]


@final
class ProgressCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes each entry of Trainer's log as a line of JSON, tells `on_progress` of each step, stops at a lost loss.

    A line has `step`, `epoch`, `time_s` since this process began to train, and what Trainer logs: `loss`,
    `learning_rate`, `grad_norm`, terms of the loss; or `eval_...` of the dev split. When a run is resumed, lines
    after its checkpoint are dropped.

    Raises:
        TrainingError: the loss is NaN or infinite.
    """

    def __init__(self, log: Path | None = None, on_progress: OnTrainProgress | None = None) -> None:
        self._log = log
        self._on_progress = on_progress
        self._loss: float | None = None
        self._metrics: dict[str, float] = {}
        self._speed = 0.0
        self._began = self._step_began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if self._log is not None and state.is_world_process_zero:
            kept = self._log.read_text("utf-8").splitlines() if self._log.is_file() and state.global_step else []
            lines = [line for line in kept if json.loads(line)["step"] <= state.global_step]
            self._log.write_text("".join(f"{line}\n" for line in lines), "utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        speed = examples / (time.perf_counter() - self._step_began)
        self._speed = speed if self._speed == 0 else 0.9 * self._speed + 0.1 * speed
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        entry = dict(logs or {})
        loss = entry.get("loss")
        if loss is not None:
            self._loss = float(loss)
            entry["examples_per_s"] = round(self._speed, 1)
        self._write(state, entry)
        if loss is not None and not math.isfinite(self._loss or 0.0):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: training has diverged. A lower learning rate "
                f"(now {args.learning_rate:g}) or more warmup may help"
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._metrics = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        self._show(state)

    def _show(self, state: Any) -> None:
        if self._on_progress is not None and state.is_world_process_zero:
            self._on_progress(
                TrainProgress(
                    state.global_step, state.max_steps, state.epoch or 0.0, self._loss, self._speed, self._metrics
                )
            )

    def _write(self, state: Any, entry: dict[str, Any]) -> None:
        if self._log is not None and state.is_world_process_zero:
            when = {"step": state.global_step, "time_s": round(time.perf_counter() - self._began, 3)}
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**when, **entry}, default=float) + "\n")
