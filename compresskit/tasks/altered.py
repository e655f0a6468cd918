"""More examples of a task for a student: copies with other words, for the teacher to answer.

Source: TinyBERT (Jiao et al., Findings of EMNLP 2020), algorithm 1: a word is replaced with probability 0.4 by one of
its 15 nearest. There nearest are guesses of BERT or, for words of several pieces, neighbours in GloVe; here neighbours
among the teacher's own embeddings of pieces, which every model has. Labels do not survive that; copies have none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.distill.batch import NO_NUMBER
from compresskit.errors import OptionError
from compresskit.tasks.features import IGNORED, Features
from compresskit.tasks.pretraining import seeded

NEAREST = 15
"""Words of which one is taken."""
CHUNK = 2048
"""Rows of similarities to all words that are held at a time."""


@final
class AlteredTexts(torch.utils.data.Dataset[dict[str, Any]]):
    """The examples of a task, and after them copies of all of them with some words replaced, without labels.

    A copy depends on the seed and on its example alone, not on epoch, batch or process. It is as long as its example
    and special tokens stay, so spans and masks hold. Labels of copies are those that losses leave out: IGNORED, and
    NO_NUMBER where the label is a number.

    Args:
        features: of `tokenized`.
        words: module that embeds ids, of the model that will answer.
        tokenizer: its own.
        copies: of each example.
        share: of the tokens that are replaced.

    Raises:
        OptionError: no copies, or a share outside of (0, 1].
    """

    def __init__(
        self,
        features: Features,
        words: torch.nn.Module,
        tokenizer: Any,
        *,
        copies: int,
        share: float = 0.4,
        seed: int = 0,
    ) -> None:
        if copies < 1:
            raise OptionError(f"altered_copies is {copies}; at least 1 is expected")
        if not 0 < share <= 1:
            raise OptionError(f"altered_share is {share}; a share above 0, at most 1, is expected")
        self._features, self._copies, self._share, self._seed = features, copies, share, seed
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        used = torch.tensor(sorted({i for ids in features["input_ids"][:] for i in ids}))
        nearest = _nearest(words, used, len(tokenizer), self._special)
        self._choice = nearest.shape[1]
        self._nearest = dict(zip(used.tolist(), nearest, strict=True))

    def __len__(self) -> int:
        return len(self._features) * (1 + self._copies)

    def __getitem__(self, key: Any) -> Any:
        """A row, or the column `length`."""
        if key == "length":
            return list(self._features["length"][:]) * (1 + self._copies)
        copy, row = divmod(key, len(self._features))
        example = self._features[row]
        return self._altered(example, copy) if copy else example

    def _altered(self, example: Mapping[str, Any], copy: int) -> dict[str, Any]:
        ids = torch.tensor(example["input_ids"])
        generator = seeded(self._seed, [copy, *example["input_ids"]])
        chosen = (torch.rand(len(ids), generator=generator) < self._share) & ~torch.isin(ids, self._special)
        picks = torch.randint(self._choice, (len(ids),), generator=generator)
        other = torch.stack([self._nearest[i] for i in ids.tolist()]).gather(1, picks[:, None])[:, 0]
        labels = {name: _no_label(example[name]) for name in _LABELS if name in example}
        return {**example, **labels, "input_ids": torch.where(chosen, other, ids).tolist()}


_LABELS = ("labels", "start_positions", "end_positions")


def _no_label(label: Any) -> Any:
    if isinstance(label, Sequence):
        return [IGNORED] * len(label)
    return NO_NUMBER if isinstance(label, float) else IGNORED


@torch.no_grad()
def _nearest(words: torch.nn.Module, used: Tensor, number: int, special: Tensor) -> Tensor:
    """(used, NEAREST) ids: by cosine the nearest of each id among the others, fewer where there are fewer words.

    Special tokens are nobody's.
    """
    device = next(words.parameters()).device
    table = F.normalize(words(torch.arange(number, device=device)).float(), dim=-1)
    count, found = min(NEAREST, number - len(special) - 1), []
    for ids in used.to(device).split(CHUNK):
        cosines = table[ids] @ table.T
        cosines[:, special.to(device)] = -torch.inf
        cosines.scatter_(1, ids[:, None], -torch.inf)
        found.append(cosines.topk(count, dim=1).indices.cpu())
    return torch.cat(found)
