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


@final
class Answers:
    """Last hidden states or logits of a model on some batches.

    Raises:
        CalibrationError: the model returns neither.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._batches = batches
        with undisturbed(model), torch.no_grad():
            self._wanted = [_answer(model, batch) for batch in batches]
        self._energy = sum(float(answer.double().square().sum()) for answer in self._wanted)

    def squared_error(self, model: nn.Module) -> float:
        """Squared difference of another model's answers over the squared answers themselves; padding does not count."""
        lost = 0.0
        with undisturbed(model), torch.no_grad():
            for batch, wanted in zip(self._batches, self._wanted, strict=True):
                lost += float((_answer(model, batch) - wanted).double().square().sum())
        return lost / max(self._energy, torch.finfo(torch.float64).tiny)


def _answer(model: nn.Module, batch: Batch) -> Tensor:
    """What the model answers, padding as zeros."""
    given = arguments(model, batch, next(model.parameters()).device)
    output = forward(model, given, gradients=False)
    fields: Mapping[str, Tensor] = output if isinstance(output, Mapping) else {}
    names = ("last_hidden_state", "logits", "start_logits")
    answer = output if isinstance(output, Tensor) else next((fields[name] for name in names if name in fields), None)
    if not isinstance(answer, Tensor):
        raise CalibrationError(
            f"{type(model).__name__} returns neither a last hidden state nor logits, so there is nothing to measure by"
        )
    rows, _ = Masks.of(given).real("decoder", tuple(answer.shape[:-1]))
    return answer if rows is None else answer * rows.view(answer.shape[:-1])[..., None]
