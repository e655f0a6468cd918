"""A teacher's answers to one example as one row of numbers: what `cache` keeps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from compresskit.distill.features import Feature
from compresskit.errors import CacheError

Answers = Mapping[Feature, Tensor]
"""Each (batch, ...), of most features (batch, time, ...)."""


@final
@dataclass(frozen=True)
class Layout:
    """Where the features of an example stand in its row: token by token, and behind them what there is once.

    Args:
        shapes: of each feature, in their order, without batch and time.
        per_token: whether it has an axis of time.
    """

    shapes: tuple[tuple[int, ...], ...]
    per_token: tuple[bool, ...]

    @classmethod
    def of(cls, answers: Answers) -> "Layout":
        """That of such answers."""
        per_token = tuple(_per_token(feature, tensor.dim() - 1) for feature, tensor in answers.items())
        cut = (tensor.shape[1 + timed :] for tensor, timed in zip(answers.values(), per_token, strict=True))
        return cls(tuple(map(tuple, cut)), per_token)

    @classmethod
    def from_json(cls, said: Any) -> "Layout":
        """That which `to_json` said."""
        return cls(tuple(tuple(shape) for shape, _ in said), tuple(timed for _, timed in said))

    def to_json(self) -> list[Any]:
        """Shape of each feature, and whether it has an axis of time."""
        return [[list(shape), timed] for shape, timed in zip(self.shapes, self.per_token, strict=True)]

    def rows(self, answers: Answers, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The row of each example, without its padding and on the processor.

        Args:
            mask: (batch, time) bool.

        Raises:
            CacheError: a number does not fit the type.
        """
        batch, parts = len(mask), []
        for timed in (True, False):
            flat = [
                (tensor[mask] if timed else tensor).detach().reshape(-1, width)
                for tensor, width, own in zip(answers.values(), self._widths(), self.per_token, strict=True)
                if own == timed
            ]
            if flat:
                counts = mask.sum(1).tolist() if timed else [1] * batch
                parts.append(torch.cat(flat, 1).to("cpu", dtype).split(counts))
        made = [torch.cat([part.flatten() for part in example]) for example in zip(*parts, strict=True)]
        if not torch.cat(made).isfinite().all():
            _refuse(answers, dtype)
        return made

    def answers(self, features: Sequence[Feature], rows: Sequence[Tensor], mask: Tensor) -> dict[Feature, Tensor]:
        """The features of a batch from the rows of its examples: zeros as padding, float32 on the mask's device."""
        widths, found = self._widths(), dict[Feature, Tensor]()
        for timed in (True, False):
            own = [place for place, kind in enumerate(self.per_token) if kind == timed]
            wide = sum(widths[place] for place in own)
            once = sum(width for width, kind in zip(widths, self.per_token, strict=True) if not kind)
            cut = [row[: len(row) - once] if timed else row[len(row) - once :] for row in rows]
            flat = torch.cat(cut).view(-1, wide) if own else torch.empty(0)
            columns = flat.to(mask.device).float().split([widths[place] for place in own], 1) if own else ()
            for place, numbers in zip(own, columns, strict=True):
                shape, made = self.shapes[place], numbers
                if timed:
                    made = numbers.new_zeros(*mask.shape, numbers.shape[1])
                    made[mask] = numbers
                found[features[place]] = made.reshape(*mask.shape[: 1 + timed], *shape)
        return {feature: found[feature] for feature in features}

    def _widths(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]


def _per_token(feature: Feature, dims: int) -> bool:
    """Whether the first axis of one example's tensor is time; logits over classes and over places look alike."""
    if feature.role in ("start", "end"):
        return True
    return feature.role != "next-sentence" and dims > 1


def _refuse(answers: Answers, dtype: torch.dtype) -> None:
    for feature, tensor in answers.items():
        if not tensor.to(dtype).isfinite().all():
            most = float(tensor.abs().max())
            raise CacheError(f"the teacher's {feature} holds {most:g}, which {dtype} cannot hold; store bfloat16")
