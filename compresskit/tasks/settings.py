"""How training runs: one place for what fine-tuning and distillation share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
import transformers

from compresskit.errors import OptionError

LOG_STEPS = 10
"""Optimiser steps between two entries of the log."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a training run. The defaults are the usual ones for fine-tuning BERT.

    Args:
        epochs: passes over the training data; may be a fraction.
        max_steps: stop after this many optimiser steps, and let the learning rate fall to zero there.
        lr: highest learning rate.
        batch_size: examples in a batch of one device.
        accumulate: batches whose gradients make one step.
        warmup: share of the steps in which the learning rate rises.
        schedule: how it falls afterwards.
        weight_decay: of AdamW, biases and norms excepted.
        max_grad_norm: gradients are scaled down to this norm.
        dropout: of every `nn.Dropout` of the model while it trains; None: its own.
        eval_steps: score the dev split and keep a checkpoint every so many steps; None: after every epoch.
        patience: stop after so many scores in a row that are not the best; None: never.
        bf16: multiply in bfloat16 (autocast), weights stay as they are.
        device: `auto` takes an accelerator if there is one.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    lr: float = 2e-5
    batch_size: int = 32
    accumulate: int = 1
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    seed: int = 0
    eval_steps: int | None = None
    patience: int | None = None
    bf16: bool = False
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} is {getattr(self, name)!r}; a number above 0 is expected")
        for name in ("batch_size", "accumulate", "max_steps", "eval_steps", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value!r}; at least 1 is expected")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"warmup is {self.warmup!r}; a share of the steps, from 0 to below 1, is expected")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise OptionError(f"dropout is {self.dropout!r}; a share from 0 to below 1 is expected")
        if self.weight_decay < 0 or self.seed < 0:
            raise OptionError(f"weight_decay ({self.weight_decay}) and seed ({self.seed}) cannot be negative")
        on_cuda = self.device != "cpu" and torch.cuda.is_available()
        if self.bf16 and on_cuda and not torch.cuda.is_bf16_supported():
            raise OptionError("this GPU cannot multiply in bfloat16; leave bf16 out")

    def torch_device(self) -> torch.device:
        """Where a model trains: the accelerator of this process, or the processor."""
        found = None if self.device == "cpu" else torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")

    def advice(self) -> str | None:
        """What would train faster here: bfloat16, where the processor has units for it (AMX) and none was asked for."""
        ask = getattr(torch.cpu, "get_capabilities", None)  # not in every version
        if self.bf16 or self.torch_device().type != "cpu" or not (ask and ask().get("amx_bf16")):
            return None
        return "this processor has units for bfloat16: with --bf16 (bf16 = true) steps may take half as long"


def training_arguments(settings: TrainSettings, folder: str | Path, *, metric: str, **more: Any) -> Any:
    """`transformers.TrainingArguments` for a run that keeps its checkpoints in `folder`.

    Scores and saves at the same moments, keeps the best and the last checkpoint, loads the best at the end; prints
    nothing, reports nowhere. Columns that no model takes stay: `Collator` leaves them out, and `length` is needed.

    Args:
        metric: of the dev split; the checkpoint with the highest is the best.
        more: arguments of TrainingArguments that a kind of training sets itself.
    """
    every = settings.eval_steps
    moments = "epoch" if every is None else "steps"
    steps = {} if every is None else {"eval_steps": every, "save_steps": every}
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if settings.max_steps is None else settings.max_steps,
        "learning_rate": settings.lr,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.schedule,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "bf16": settings.bf16,
        "use_cpu": settings.torch_device().type == "cpu",  # its bfloat16 is refused otherwise
        "eval_strategy": moments,
        "save_strategy": moments,
        **steps,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": True,
        "logging_steps": LOG_STEPS,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": settings.device != "cpu" and torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }
    return transformers.TrainingArguments(**arguments)
