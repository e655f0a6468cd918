"""A scalar whose gradients say how much each output of a layer matters, with labels or without."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.calibration.data import IGNORED
from compresskit.calibration.masks import Masks
from compresskit.errors import CalibrationError

LABELLED = "the model's own loss on the labels of the data (empirical Fisher)"
DRAWN = "cross-entropy on labels drawn from the model's own predictions (Fisher)"
FEATURES = "the output times standard normal noise (Gauss-Newton: every feature matters alike)"


def loss_of(
    model: nn.Module, output: Any, batch: Mapping[str, Tensor], masks: Masks, generator: torch.Generator
) -> tuple[Tensor, str]:
    """A sum over examples or tokens, and what it is called; no mean, so that the size of batches does not matter.

    With labels in the batch, the model's own loss. Else labels are drawn from what the model predicts, which gives the
    Fisher information (Martens, JMLR 21 (2020), section 5). An encoder without head, or one output of a regression, is
    read as the mean of a normal distribution: there the gradient of the log likelihood is noise at the output.

    Raises:
        CalibrationError: the model returns nothing of the kind.
    """
    found = output if isinstance(output, Mapping) else {}
    loss = found.get("loss")
    if isinstance(loss, Tensor) and loss.dim() == 0:
        labels = next((batch[name] for name in ("labels", "start_positions") if name in batch), None)
        count = 1 if labels is None else int((labels != IGNORED).sum()) if labels.dim() > 1 else len(labels)
        return loss * count, LABELLED
    logits = [found[name] for name in ("logits", "start_logits", "end_logits") if name in found]
    if logits and _categorical(model, logits[0]):
        return torch.stack([_drawn(scores, masks, generator) for scores in logits]).sum(), DRAWN
    hidden = output if isinstance(output, Tensor) else found.get("last_hidden_state", logits[0] if logits else None)
    if not isinstance(hidden, Tensor):
        raise CalibrationError(
            f"{type(model).__name__} returns neither logits nor a last hidden state, so there is nothing to take "
            "gradients of; leave gradients out"
        )
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    rows, _ = masks.real("decoder", tuple(hidden.shape[:-1]))
    if rows is not None:
        noise = noise * rows.view(hidden.shape[:-1]).unsqueeze(-1).to(hidden)
    return (hidden * noise).sum(), FEATURES


def _categorical(model: nn.Module, logits: Tensor) -> bool:
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return logits.shape[-1] > 1 and problem not in ("regression", "multi_label_classification")


def _drawn(logits: Tensor, masks: Masks, generator: torch.Generator) -> Tensor:
    """Cross-entropy of logits (..., classes) with labels drawn from them, summed over what is real."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    rows, _ = masks.real("decoder", tuple(logits.shape[:-1]))
    if rows is not None:
        flat = flat[rows.to(flat.device)]
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
    return F.cross_entropy(flat, labels.to(flat.device), reduction="sum")
