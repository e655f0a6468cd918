"""One batch as losses see it: which tokens are real, what the labels are, how much there is to average over.

A loss is a sum over one kind of unit. Dividing it by the units of the whole optimiser step, those of the other
micro-batches and processes included, makes the result independent of how the step was cut into pieces.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from compresskit.errors import DistillError

Unit = Literal["example", "token", "pair", "label"]
UNITS: tuple[Unit, ...] = get_args(Unit)
LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label")
IGNORED = -100
"""Labels of this value are none, as everywhere in transformers."""
NO_NUMBER = -math.inf
"""The same where labels are numbers; nan is a mistake in the data."""


@final
@dataclass(frozen=True)
class Batch:
    """What the collator made.

    Args:
        inputs: everything but the labels, by argument name of the model.
        labels: by argument name.
        mask: (batch, time) bool; padding is false.
        causal: whether a token sees only those before it.
        shifted: whether logits at one place are about the next, as in a causal language model.
    """

    inputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    mask: Tensor
    causal: bool
    shifted: bool

    @property
    def pairs(self) -> Tensor:
        """(batch, 1, time, time) bool: whether query i sees key j and both are real."""
        pairs = self.mask[:, None, :, None] & self.mask[:, None, None, :]
        return pairs.tril() if self.causal else pairs

    @property
    def labelled(self) -> Tensor:
        """(batch, time) bool: places whose logits have a label."""
        return self.token_labels() != IGNORED

    def label(self, name: str = "labels") -> Tensor:
        """Labels by argument name.

        Raises:
            DistillError: the batch has none.
        """
        if name not in self.labels:
            raise DistillError(f"the objective needs {name!r}; the batch has {', '.join([*self.inputs, *self.labels])}")
        return self.labels[name]

    def token_labels(self) -> Tensor:
        """(batch, time): the label of the logits at each place; where they are shifted, that of the next place."""
        labels = self.label()
        if labels.shape != self.mask.shape:
            raise DistillError(
                f"labels of tokens have the shape of the input, {tuple(self.mask.shape)}; got {tuple(labels.shape)}"
            )
        if self.shifted:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        return labels.masked_fill(~self.mask, IGNORED)

    def counts(self) -> Tensor:
        """(4,) float32: number of units of each kind in the order of `UNITS`; labels of tokens only."""
        lengths = self.mask.sum(-1)
        pairs = lengths * (lengths + 1) // 2 if self.causal else lengths.square()
        labels = self.labels.get("labels")
        labelled = (
            self.labelled.sum() if labels is not None and labels.shape == self.mask.shape else lengths.new_zeros(())
        )
        counts = torch.stack([lengths.new_tensor(len(lengths)), lengths.sum(), pairs.sum(), labelled])
        return counts.float()


def make_batch(inputs: Mapping[str, Any], *, causal: bool, shifted: bool = False) -> Batch:
    """Split what a collator made.

    Raises:
        DistillError: there is no `input_ids` or `inputs_embeds`, or the attention mask is not (batch, time).
    """
    main = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if main is None:
        raise DistillError(f"a batch needs input_ids or inputs_embeds; this one has {', '.join(inputs) or 'nothing'}")
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(main.shape[:2], device=main.device)
    if mask.shape != main.shape[:2]:
        raise DistillError(f"the attention mask is (batch, time) = {tuple(main.shape[:2])}, got {tuple(mask.shape)}")
    rest = {name: value for name, value in inputs.items() if name not in LABELS}
    labels = {name: inputs[name] for name in LABELS if inputs.get(name) is not None}
    return Batch(rest, labels, mask.bool(), causal, shifted)
