"""What a model answers on samples, and how far another one is from it."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from compresskit.calibration.calibrate import forward
from compresskit.calibration.collect import undisturbed
from compresskit.calibration.data import Batch, arguments
from compresskit.calibration.masks import Masks
from compresskit.errors import CalibrationError

KNOWN = ("last_hidden_state", "logits", "start_logits")
"""What of an output counts; without these, its first tensor of numbers for each example."""
MOST_BYTES = 2**28
"""Answers that are kept; those that are left are asked for again, as logits of many words take gigabytes."""


@final
class Answers:
    """Last hidden states or logits of a model on some batches. The model must stay as it is.

    Raises:
        CalibrationError: the model returns no tensor.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._kept: list[Tensor] = []
        self._energy, num_bytes = 0.0, 0
        with undisturbed(model), torch.no_grad():
            for batch in batches:
                answer = _answer(model, batch)
                self._energy += _sum_of_squares(answer)
                num_bytes += answer.numel() * answer.element_size()
                if num_bytes <= MOST_BYTES:
                    self._kept.append(answer)

    def squared_error(self, model: nn.Module) -> float:
        """Squared difference of another model's answers over the squared answers themselves; padding does not count."""
        lost = 0.0
        with undisturbed(model), undisturbed(self._model), torch.no_grad():
            for i, batch in enumerate(self._batches):
                wanted = self._kept[i] if i < len(self._kept) else _answer(self._model, batch)
                lost += _sum_of_squares(_answer(model, batch) - wanted)
        return lost / max(self._energy, torch.finfo(torch.float64).tiny)


def _sum_of_squares(answer: Tensor) -> float:
    return float(answer.double().square().sum())


def _answer(model: nn.Module, batch: Batch) -> Tensor:
    """What the model answers, padding as zeros."""
    given = arguments(model, batch, next(model.parameters()).device)
    output = forward(model, given, gradients=False)
    fields: Mapping[str, Tensor] = output if isinstance(output, Mapping) else {}
    tensors = [output] if isinstance(output, Tensor) else [fields[name] for name in KNOWN if name in fields]
    tensors += [t for t in fields.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1]
    if not tensors:
        raise CalibrationError(
            f"{type(model).__name__} returns no tensor of numbers for each example, such as a last hidden state or "
            "logits, so there is nothing to compare models by; leave out what compares or searches, or let a function "
            "of your own compare (compare=, search=)"
        )
    answer = tensors[0]
    rows, _ = Masks.of(given).real("decoder", tuple(answer.shape[:-1]))
    return answer if rows is None else answer * rows.view(answer.shape[:-1])[..., None]
