"""The measured speed-up of a compressed model: its forward pass against that of the dense model, taking turns."""

import copy
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from compresskit import dequantize_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH = 1, 128
MIN_ROUNDS, MAX_ROUNDS = 3, 15
CHEAP_S = 1.0
"""What measuring may take unless it was asked for."""
CHEAP_BYTES = 10**9
"""Size of a dense model that is built for it unless it was asked for."""
HINT = "--measure does it"


def measure(model: "PreTrainedModel", *, dense_bytes: int, asked: bool) -> dict[str, Any]:
    """Median over rounds of the dense forward time / the compressed one, and how it was measured.

    The dense model is the compressed one with its layers multiplied out, of the same sizes as the original.

    Args:
        dense_bytes: of the dense model's parameters.
        asked: measure at any cost; otherwise only if it is cheap.

    Returns:
        `speedup`, `batch`, `length`, `rounds`, `device`; or `skipped` with the reason.
    """
    inputs = _inputs(model)
    if inputs is None:
        return {"skipped": f"the forward pass of {type(model).__name__} takes more than texts"}
    if not asked and dense_bytes > CHEAP_BYTES:
        return {"skipped": f"the dense model takes {dense_bytes / 1e9:.1f} GB; {HINT}"}
    started = time.perf_counter()
    _forward_s(model, inputs)
    if not asked and _forward_s(model, inputs) * 2 * MIN_ROUNDS > CHEAP_S:
        return {"skipped": f"it would take longer than {CHEAP_S:g} s; {HINT}"}
    dense = copy.deepcopy(model)
    dequantize_(dense)
    _forward_s(dense, inputs)
    round_s = _forward_s(dense, inputs) + _forward_s(model, inputs)
    rounds = MAX_ROUNDS if asked else min(MAX_ROUNDS, int((CHEAP_S - (time.perf_counter() - started)) / round_s))
    if rounds < MIN_ROUNDS:
        return {"skipped": f"it would take longer than {CHEAP_S:g} s; {HINT}"}
    ratios = [_forward_s(dense, inputs) / _forward_s(model, inputs) for _ in range(rounds)]
    batch, length = inputs["input_ids"].shape
    where = {"batch": batch, "length": length, "rounds": rounds, "device": str(model.device)}
    return {"speedup": statistics.median(ratios), **where}


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
def _forward_s(model: "PreTrainedModel", inputs: dict[str, torch.Tensor]) -> float:
    _wait(model.device)
    started = time.perf_counter()
    model(**inputs)
    _wait(model.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
