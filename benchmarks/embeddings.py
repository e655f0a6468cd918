"""Sentence embeddings and what a compression does to them. Imports torch: import it late."""

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

SENTENCES = Path(__file__).parent / "sentences.txt"
MAX_TOKENS = 128
BATCH = 64


def read_sentences() -> list[str]:
    """The sentences that this project wrote, one a line."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()


def tokenize(tokenizer: Any, sentences: Sequence[str]) -> Any:
    """A padded batch."""
    return tokenizer(list(sentences), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Embeddings (sentences, hidden) of unit length, on the CPU: the mean of the last hidden states without padding."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # alike in length, little padding
    embedded: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        batch = tokenize(tokenizer, [sentences[i] for i in indices]).to(device)
        hidden = model(**batch).last_hidden_state  # (batch, time, hidden)
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        embedded.update(zip(indices, pooled, strict=True))
    return torch.stack([embedded[i] for i in range(len(sentences))])


def agreement(ours: Tensor, dense: Tensor) -> dict[str, float]:
    """How far two sets of embeddings (sentences, hidden) of the same sentences say the same.

    Returns:
        mean_cosine: between the two embeddings of a sentence, mean over the sentences.
        similarity_spearman: rank correlation of the cosines of all pairs of sentences.
    """
    pairs = torch.triu_indices(len(ours), len(ours), offset=1)
    cosines = [(e @ e.T)[pairs[0], pairs[1]].numpy() for e in (ours, dense)]
    return {
        "mean_cosine": float((ours * dense).sum(-1).mean()),
        "similarity_spearman": float(spearmanr(*cosines).statistic),
    }


@final
@dataclass(frozen=True)
class StsB:
    """Pairs of sentences with human scores of their likeness (0 to 5).

    Args:
        sha256: of the file.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]
    sha256: str

    def every(self, number: int) -> "StsB":
        """So many of the pairs, evenly spread."""
        take = [i * len(self.scores) // number for i in range(number)]
        first, second, scores = (tuple(of[i] for i in take) for of in (self.first, self.second, self.scores))
        return StsB(first, second, scores, self.sha256)  # type: ignore[arg-type]

    def spearman(self, model: nn.Module, tokenizer: Any) -> float:
        """Rank correlation of the cosines of embeddings with the scores, between -1 and 1."""
        return rank_correlation(self.cosines(model, tokenizer), self.scores)

    def cosines(self, model: nn.Module, tokenizer: Any) -> list[float]:
        """Of the embeddings of each pair."""
        first, second = embed(model, tokenizer, [*self.first, *self.second]).split(len(self.scores))
        cosines: list[float] = (first * second).sum(-1).tolist()
        return cosines


def disagreement(dense: nn.Module, tokenizer: Any, pairs: StsB) -> Callable[[nn.Module], float]:
    """How wrong a model is: 1 - rank correlation of its cosines of pairs with the dense one's; scores have no say."""
    wanted = pairs.cosines(dense, tokenizer)
    return lambda small: 1 - rank_correlation(pairs.cosines(small, tokenizer), wanted)


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman's, between -1 and 1."""
    return float(spearmanr(ours, theirs).statistic)


def read_sts_b(path: Path) -> StsB:
    """STS-B as GLUE distributes it: tab-separated, no quoting, a header with sentence1, sentence2, score."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = [tuple(row[name] for row in rows) for name in ("sentence1", "sentence2", "score")]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return StsB(columns[0], columns[1], tuple(map(float, columns[2])), digest)
