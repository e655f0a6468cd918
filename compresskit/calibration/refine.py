"""Block-wise refinement: the factors of one layer of a transformer are trained to answer as the dense layer does.

No labels, and no backward pass through the rest of the model: what the layer reads, and what the dense one answers, is
kept. Layer after layer, each on what the refined layers before it produce, so that their errors are made up for.

Sources: reconstruction of one block at a time as in AdaRound and BRECQ (Nagel et al., ICML 2020; Li et al., ICLR 2021),
here of factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from compresskit.calibration.blocks import Stack
from compresskit.core.modules import FactorizedLinear
from compresskit.errors import CalibrationError
from compresskit.surgery.pricing import OnProgress, Progress

HELD_OUT = 8
"""One batch of so many is held out: the epoch that does best on these is kept, the start included."""


@final
@dataclass(frozen=True)
class Refine:
    """How a layer is refined.

    Args:
        epochs: passes over the samples, for each layer.
        lr: of Adam at the start; falls to zero along a cosine.

    Raises:
        CalibrationError: an option makes no sense.
    """

    epochs: int = 10
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < 1:
            raise CalibrationError(
                f"refinement takes at least one epoch and a learning rate between 0 and 1; got {self.epochs}, {self.lr}"
            )


def refine_(
    block: nn.Module,
    stack: Stack,
    index: int,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    how: Refine,
    on_progress: OnProgress | None = None,
) -> dict[str, nn.Module]:
    """Train the factors and biases of a block; returns its factorised layers by full name. Changes the block.

    Args:
        inputs: hidden states that it reads, by batch.
        targets: what it should answer; padding does not count.
    """
    layers = {
        f"{stack.names[index]}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, FactorizedLinear)
    }
    parameters = list({id(p): p for layer in layers.values() for p in layer.parameters()}.values())
    if not parameters:
        return {}
    for parameter in parameters:
        parameter.requires_grad_(True)
    held = [b for b in range(len(inputs)) if b % HELD_OUT == HELD_OUT - 1] or [0]
    seen = [b for b in range(len(inputs)) if b not in held] or [0]
    optimizer = torch.optim.Adam(parameters, lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * len(seen))
    task = _Task(block, stack, index, inputs, targets)
    best, kept = task.error(held), [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(index)
    for epoch in range(how.epochs):
        for at in torch.randperm(len(seen), generator=generator).tolist():
            optimizer.zero_grad()
            with torch.enable_grad():
                task.loss(seen[at]).backward()
            optimizer.step()
            schedule.step()
        error = task.error(held)
        if error < best:
            best, kept = error, [parameter.detach().clone() for parameter in parameters]
        if on_progress is not None:
            done, total = index * how.epochs + epoch + 1, len(stack.names) * how.epochs
            on_progress(Progress("refine", stack.names[index], done, total, error**0.5))
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    return dict(layers)


@final
class _Task:
    """Mean squared error of a block's answers over their variance."""

    def __init__(
        self, block: nn.Module, stack: Stack, index: int, inputs: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> None:
        self._block, self._stack, self._index, self._inputs, self._targets = block, stack, index, inputs, targets
        self._rows = [
            masks.real(stack.names[index], tuple(target.shape[:-1]))[0]
            for masks, target in zip(stack.masks, targets, strict=True)
        ]
        real = torch.cat([self._real(target, b) for b, target in enumerate(targets)])
        self._variance = float(real.float().var(0).mean()) or 1.0

    def _real(self, states: Tensor, batch: int) -> Tensor:
        flat, rows = states.reshape(-1, states.shape[-1]), self._rows[batch]
        return flat if rows is None else flat[rows.to(flat.device)]

    def loss(self, batch: int) -> Tensor:
        """Over the tokens of one batch."""
        answer = self._stack.run(self._block, self._index, batch, self._inputs[batch])
        difference = self._real(answer, batch) - self._real(self._targets[batch], batch)
        return difference.float().square().mean() / self._variance

    @torch.no_grad()
    def error(self, batches: Sequence[int]) -> float:
        """Mean over some batches."""
        return sum(float(self.loss(b)) for b in batches) / len(batches)
