"""Plain text with labels of its own: masked words, and pairs of texts of which the second follows the first or not.

Source: BERT (Devlin et al., NAACL 2019), section 3.1. Which words are masked depends on the seed and on the text alone,
not on the epoch, the batch or the process: runs can be resumed and cut into processes, and a cache finds texts again.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import datasets
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
class SentencePairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Each piece of a corpus followed by another: in half of the cases the next one of its document, else any.

    Args:
        corpus: of `load_corpus` with this tokenizer.
        tokenizer: what it puts around and between two texts is put there, token types included.
        labelled: with `next_sentence_label`.
    """

    def __init__(self, corpus: Features, tokenizer: Any, *, seed: int = 0, labelled: bool = True) -> None:
        self._corpus, self._seed, self._labelled = corpus, seed, labelled
        self._form = _PairForm.of(tokenizer)
        lengths, documents = list(corpus["length"][:]), list(corpus["document"][:])
        self._pairs = [self._partner(i, documents) for i in range(len(corpus))]
        added = self._form.added()
        self._lengths = [lengths[i] + lengths[j] + added for i, (j, _) in enumerate(self._pairs)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, key: Any) -> Any:
        """A row, or the column `length`."""
        if key == "length":
            return self._lengths
        second, follows = self._pairs[key]
        row = self._form.joined(self._corpus[key]["input_ids"], self._corpus[second]["input_ids"])
        label = {"next_sentence_label": 0 if follows else 1} if self._labelled else {}  # BERT's: 0 is "follows"
        return {**row, **label, "length": self._lengths[key]}

    def sample(self, count: int, *, seed: int = 0) -> Features:
        """Some of the pairs, at random, as a `datasets.Dataset`."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self), generator=generator)[:count].sort().values
        return datasets.Dataset.from_list([self[i] for i in chosen.tolist()])

    def _partner(self, row: int, documents: Sequence[int]) -> tuple[int, bool]:
        generator = seeded(self._seed, [row])
        follows = row + 1 < len(documents) and documents[row + 1] == documents[row]
        if follows and torch.rand((), generator=generator) < 0.5:
            return row + 1, True
        other = int(torch.randint(len(documents), (), generator=generator))
        return other, follows and other == row + 1


@final
@dataclass(frozen=True, kw_only=True)
class _PairForm:
    """What a tokenizer puts before, between and after two texts, and around one; each with its token types, if any."""

    alone: tuple[int, int]
    around: tuple[list[int], list[int], list[int]]
    types: tuple[list[int], int, list[int], int, list[int]] | None

    @classmethod
    def of(cls, tokenizer: Any) -> "_PairForm":
        text = tokenizer("a", add_special_tokens=False)["input_ids"]
        one, two = tokenizer("a")["input_ids"], tokenizer("a", "a")
        ids, n = two["input_ids"], len(text)
        (start,) = _places(one, text)
        first, second = _places(ids, text)
        cuts = slice(0, first), slice(first + n, second), slice(second + n, len(ids))
        kinds = two.get("token_type_ids")
        before, between, after = (list(ids[cut]) for cut in cuts)
        types = None
        if kinds is not None:
            types = (list(kinds[cuts[0]]), kinds[first], list(kinds[cuts[1]]), kinds[second], list(kinds[cuts[2]]))
        return cls(alone=(start, len(one) - start - n), around=(before, between, after), types=types)

    def added(self) -> int:
        """Special tokens of a pair that its two texts do not have by themselves."""
        return sum(map(len, self.around)) - 2 * sum(self.alone)

    def joined(self, first: list[int], second: list[int]) -> dict[str, Any]:
        head, tail = self.alone
        one, two = (ids[head : len(ids) - tail] for ids in (first, second))
        before, between, after = self.around
        row: dict[str, Any] = {"input_ids": [*before, *one, *between, *two, *after]}
        row["attention_mask"] = [1] * len(row["input_ids"])
        if self.types is not None:
            start, kind, middle, other, end = self.types
            row["token_type_ids"] = [*start, *[kind] * len(one), *middle, *[other] * len(two), *end]
        return row


def _places(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where a sequence holds another; both of them are short."""
    return [i for i in range(len(ids)) if list(ids[i : i + len(part)]) == list(part)]


def seeded(seed: int, ids: Sequence[int]) -> torch.Generator:
    """A generator that depends on a seed and on some numbers alone."""
    return torch.Generator().manual_seed(zlib.crc32(repr([seed, *ids]).encode()))
