"""Plain text with labels of its own: masked words, next words, and pairs of texts, the second the next one or not.

Source: BERT (Devlin et al., NAACL 2019), section 3.1. Which words are masked depends on the seed and on the text alone,
not on the epoch, the batch or the process: runs can be resumed and cut into processes, and a cache finds texts again.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from compresskit.errors import DataError
from compresskit.tasks.features import IGNORED, Collator, Features

Row = Mapping[str, Any]
MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen words that are masked, and replaced by any word; the rest stays as it is."""


@final
@dataclass(frozen=True)
class PretrainingCollator:
    """Batches of plain text with `labels` at the words that are to be guessed, and what `Collator` makes.

    Args:
        share: of the words that are chosen.

    Raises:
        DataError: the tokenizer has no mask.
    """

    collate: Collator
    seed: int = 0
    share: float = 0.15

    def __post_init__(self) -> None:
        if self.collate.tokenizer.mask_token_id is None:
            raise DataError("the tokenizer has no mask token, so there is no masked language model to train")

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.collate([self._masked(row) for row in rows])
        if "next_sentence_label" in rows[0]:
            batch["next_sentence_label"] = torch.tensor([row["next_sentence_label"] for row in rows])
        return batch

    def _masked(self, row: Row) -> dict[str, Any]:
        tokenizer = self.collate.tokenizer
        ids = torch.tensor(row["input_ids"])
        generator = seeded(self.seed, row["input_ids"])
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        chance, kind = torch.rand(2, len(ids), generator=generator)
        chosen = (chance < self.share) & ~special
        if not chosen.any():  # a short text: at least one word
            chosen = (chance == chance.masked_fill(special, 2.0).min()) & ~special
        words = torch.randint(len(tokenizer), (len(ids),), generator=generator)
        shown = torch.where(chosen & (kind < MASKED), tokenizer.mask_token_id, ids)
        shown = torch.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), words, shown)
        return {**row, "input_ids": shown.tolist(), "labels": ids.masked_fill(~chosen, IGNORED).tolist()}


@final
@dataclass(frozen=True)
class NextWordsCollator:
    """Batches of plain text whose `labels` are its own tokens, and what `Collator` makes. Causal models shift them."""

    collate: Collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


@final
class SentencePairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Each piece of a corpus followed by another: in half of the cases the next one of its document, else any.

    Args:
        corpus: of `load_corpus`, of a tokenizer with one token before a text; a pair is up to twice as long as a piece.
    """

    def __init__(self, corpus: Features, *, seed: int = 0) -> None:
        self._corpus, self._seed = corpus, seed
        lengths, documents = list(corpus["length"][:]), list(corpus["document"][:])
        self._pairs = [self._partner(i, documents) for i in range(len(corpus))]
        self._lengths = [lengths[i] + lengths[j] - 1 for i, (j, _) in enumerate(self._pairs)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: Any) -> Any:
        """A row, or the column `length`."""
        if key == "length":
            return self._lengths
        second, follows = self._pairs[key]
        first, last = self._corpus[key]["input_ids"], self._corpus[second]["input_ids"][1:]  # one [CLS]
        return {
            "input_ids": [*first, *last],
            "attention_mask": [1] * (len(first) + len(last)),
            "token_type_ids": [0] * len(first) + [1] * len(last),
            "next_sentence_label": 0 if follows else 1,  # BERT's: 0 is "follows"
            "length": len(first) + len(last),
        }

    def _partner(self, row: int, documents: Sequence[int]) -> tuple[int, bool]:
        generator = seeded(self._seed, [row])
        follows = row + 1 < len(documents) and documents[row + 1] == documents[row]
        if follows and torch.rand((), generator=generator) < 0.5:
            return row + 1, True
        other = int(torch.randint(len(documents), (), generator=generator))
        return other, follows and other == row + 1


def seeded(seed: int, ids: Sequence[int]) -> torch.Generator:
    """A generator that depends on a seed and on some numbers alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr([seed, *ids]).encode()))
