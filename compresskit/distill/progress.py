"""What a training says about itself: the terms of its loss, its speed, the time left, and a log for programs."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@final
class Meter:
    """Sums since the last log entry.

    Time runs from `start` to `stop`, once per optimiser step, so evaluation and saving do not count.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = 0.0
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
        self._steps = 0
        self._time_s = 0.0

    def start(self) -> None:
        """An optimiser step begins."""
        self._started = self._clock()

    def add_terms(self, terms: Mapping[str, Tensor]) -> None:
        """One micro-batch; a term is the sum over the micro-batches of a step, a mean over steps."""
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value if name in self._terms else value

    def add_tokens(self, tokens: Tensor) -> None:
        """Real tokens of one step, of all processes."""
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def stop(self) -> None:
        """An optimiser step has ended."""
        self._steps += 1
        self._time_s += self._clock() - self._started

    def take(self, steps_left: int, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Figures since the last call, and start anew; empty if there was no step.

        Args:
            steps_left: optimiser steps until the end.
            mean: of a tensor over all processes.

        Returns:
            loss_<term>: mean per step, weighted, so that they add up to `loss`. tokens_per_s: real tokens of all
            processes. time_left_s: at the speed of these steps.
        """
        if not self._steps:
            return {}
        logs: dict[str, float] = {}
        if self._terms:
            values = mean(torch.stack(list(self._terms.values())) / self._steps).tolist()
            logs = {f"loss_{name}": value for name, value in zip(self._terms, values, strict=True)}
        if self._tokens is not None and self._time_s > 0:
            logs["tokens_per_s"] = round(float(self._tokens) / self._time_s, 1)
        logs["time_left_s"] = round(self._time_s / self._steps * steps_left, 1)
        self._reset()
        return logs


@final
class JsonLinesLog(TrainerCallback):  # type: ignore[misc]
    """Appends every log entry of a training to a file, one JSON object a line, with the step and the seconds so far.

    A training that resumes goes on in the same file; lines of steps that it does again are dropped first.

    Args:
        path: of the file; only the main process writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if state.global_step and json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            elapsed = round(time.perf_counter() - self._started, 3)
            entry = {"step": state.global_step, "max_steps": state.max_steps, "time_s": elapsed, **(logs or {})}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _lines(self) -> list[str]:
        """Complete lines; a training that was killed may have left half of one."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()
