"""The measured speed-up of a model: its forward pass before it is compressed, and after.

One after the other rather than in turns, for a dense copy beside the compressed model would take as much memory as all
the rest of a compression.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch

from compresskit import kernel_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH = 1, 128
MIN_ROUNDS, MAX_ROUNDS = 3, 15
CHEAP_S = 0.8
"""What timing the dense model may take unless it was asked for."""


@final
@dataclass(frozen=True)
class Timing:
    """Forward times of the dense model in seconds, or why there are none."""

    times_s: tuple[float, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skipped: str | None = None


def time_dense(model: "PreTrainedModel", wanted: bool | None) -> Timing:
    """Time the model's forward pass on random tokens.

    Args:
        wanted: at any cost, or (False) not at all; None: only if it is cheap.
    """
    if wanted is False:
        return Timing(skipped="--no-measure")
    inputs = _inputs(model)
    if inputs is None:
        return Timing(skipped=f"the forward pass of {type(model).__name__} takes more than texts")
    first_s = _forward_s(model, inputs)  # pays for what later passes find ready
    second_s = _forward_s(model, inputs)
    rounds = MAX_ROUNDS if wanted else min(MAX_ROUNDS, int((CHEAP_S - first_s) / second_s))
    if rounds < MIN_ROUNDS:
        return Timing(skipped=f"it would take longer than {CHEAP_S:g} s; --measure does it")
    return Timing((second_s, *_times_s(model, inputs, rounds - 1)), inputs)


def speedup(dense: Timing, model: "PreTrainedModel") -> dict[str, Any]:
    """Median forward time of the dense model / that of the compressed one, and how it was measured.

    Returns:
        `speedup`, `batch`, `length`, `rounds` of each model, `device`, on a processor whether there was a compiled
        `kernel`; or `skipped` with the reason.
    """
    if dense.skipped is not None:
        return {"skipped": dense.skipped}
    _forward_s(model, dense.inputs)  # as for the dense model
    times_s = _times_s(model, dense.inputs, len(dense.times_s))
    batch, length = dense.inputs["input_ids"].shape
    where = {"batch": batch, "length": length, "rounds": len(times_s), "device": str(model.device)}
    if model.device.type == "cpu":
        where["kernel"] = kernel_state().built
    return {"speedup": statistics.median(dense.times_s) / statistics.median(times_s), **where}


def _times_s(model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor], rounds: int) -> tuple[float, ...]:
    return tuple(_forward_s(model, inputs) for _ in range(rounds))


def _inputs(model: "PreTrainedModel") -> dict[str, torch.Tensor] | None:
    """Random tokens; None for a model that reads anything else."""
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids":
        return None
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (BATCH, length), generator=generator).to(model.device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}


@torch.inference_mode()
def _forward_s(model: "PreTrainedModel", inputs: Mapping[str, torch.Tensor]) -> float:
    _wait(model.device)
    started = time.perf_counter()
    model(**inputs)
    _wait(model.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
