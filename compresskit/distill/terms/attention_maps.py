"""Attention maps: the probabilities that each token gives to the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.loss import Comparison, LayerLoss, Tensors, check_heads, register, same_roles
from compresskit.distill.measures import MASKED, pair_squares, row_divergence, scores


def _divergence(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    return row_divergence(scores(*student), scores(*teacher), batch.pairs)


def _squares(student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    pairs = batch.pairs
    ours, theirs = (scores(*states).masked_fill(~pairs, MASKED).softmax(-1) for states in (student, teacher))
    return pair_squares(ours, theirs, pairs)


@register
@final
@dataclass(frozen=True, kw_only=True)
class AttentionMaps(LayerLoss):
    """How far attention probabilities are apart, mean over heads, added up over the layers.

    Args:
        kind: kl: KL(teacher || student) in nats per real token. mse: mean squared difference per real pair.
    """

    name: ClassVar[str] = "attention-maps"
    summary: ClassVar[str] = "KL divergence or mean squared difference of attention probabilities"
    source: ClassVar[str] = "MiniLM (Wang et al. 2020), eq. 6, there for the last layer only"

    kind: Literal["kl", "mse"] = "kl"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        for anatomy in (student, teacher):
            anatomy.check_scores()
        check_heads(self.name, student, teacher)
        pairs = same_roles(self.layer_pairs(student, teacher), "query", "key")
        if self.kind == "kl":
            return tuple(Comparison(ours, theirs, "token", _divergence) for ours, theirs in pairs)
        return tuple(Comparison(ours, theirs, "pair", _squares) for ours, theirs in pairs)
