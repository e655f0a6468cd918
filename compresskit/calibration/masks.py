"""Which rows of a layer's input are real tokens, as far as the masks of a batch say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from compresskit.calibration.data import IGNORED

DECODER = ("decoder",)
CROSS = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
MEMORY_SIDE = ("k", "v", "key", "value", "k_proj", "v_proj")
"""Projections of cross-attention that read what the encoder made."""


@final
@dataclass(frozen=True)
class Masks:
    """Masks of one batch, each (batch, time) bool with padding false; None where the batch has none.

    Args:
        main: of what an encoder or a decoder-only model reads.
        decoder: of what the decoder of an encoder-decoder reads.
    """

    main: Tensor | None
    decoder: Tensor | None = None

    @staticmethod
    def of(batch: Mapping[str, Tensor]) -> "Masks":
        """From `attention_mask` and `decoder_attention_mask`; without the latter, from labels that are ignored."""
        decodes = any(
            name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
        )
        decoder = _flat_mask(batch.get("decoder_attention_mask"))
        labels = batch.get("labels")
        if decoder is None and labels is not None and labels.dim() == 2 and "input_ids" in batch:
            ids = batch.get("decoder_input_ids", batch["input_ids"])
            if decodes or labels.shape != ids.shape:
                decoder = labels != IGNORED
        return Masks(_flat_mask(batch.get("attention_mask")), decoder)

    def all_padding(self) -> bool:
        """Whether no token is real."""
        return self.main is not None and not bool(self.main.any())

    def real(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor | None, bool]:
        """Which rows of an input (*shape, features) are real, flattened, None for all; and whether that is known.

        Args:
            name: of the layer, to tell encoder and decoder apart where both read as many tokens.
            shape: leading sizes: (batch, time), (time, batch), (batch * time,), or (batch,) for pooled sequences.
        """
        found = [(side, rows) for side, mask in self._sides() if (rows := _rows(mask, shape)) is not None]
        if not found:
            padded = any(not bool(mask.all()) for _, mask in self._sides())
            return None, not padded
        sides = dict(found)
        rows = sides[_side(name)] if len(sides) > 1 else found[0][1]
        return (None if bool(rows.all()) else rows), True

    def lookups(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """How often each index (*shape) of an embedding counts, flattened; None: each once.

        Position embeddings look up (1, time) or (time,) for the whole batch.
        """
        for _, mask in self._sides():
            if len(mask) > 1 and shape in ((1, mask.shape[1]), (mask.shape[1],)):
                return mask.sum(0).double()
        rows, _ = self.real(name, shape)
        return None if rows is None else rows.double()

    def _sides(self) -> list[tuple[str, Tensor]]:
        return [(side, mask) for side, mask in (("main", self.main), ("decoder", self.decoder)) if mask is not None]


def _flat_mask(mask: Tensor | None) -> Tensor | None:
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _rows(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    batch, time = mask.shape
    if shape in ((batch, time), (batch * time,)):
        return mask.flatten()
    if shape == (time, batch):
        return mask.T.flatten()
    if shape == (1, time):  # positions, looked up once for the whole batch
        return mask.any(0)
    return mask.any(1) if shape == (batch,) else None


def _side(name: str) -> str:
    """Which side of an encoder-decoder a layer reads from, by its name."""
    parts = name.lower().split(".")
    if not any(part in DECODER for part in parts):
        return "main"
    crosses = any(part in CROSS for part in parts) and parts[-1] in MEMORY_SIDE
    return "main" if crosses else "decoder"
