"""Self-relations: how values (or queries, or keys) of tokens relate to each other."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.loss import Comparison, LayerLoss, Tensors, register, same_roles
from compresskit.distill.measures import relations, row_divergence
from compresskit.errors import DistillError


def _compare(heads: int, student: Tensors, teacher: Tensors, batch: Batch) -> Tensor:
    return row_divergence(relations(student[0], heads), relations(teacher[0], heads), batch.pairs)


@register
@final
@dataclass(frozen=True, kw_only=True)
class Relations(LayerLoss):
    """KL(teacher || student) of softmax(V V^T / sqrt(size)) in nats per real token, mean over heads, sum over layers.

    The two models may differ in hidden size and heads. MiniLM compares one layer: layers=-1.

    Args:
        of: the projection whose outputs are related.
        heads: parts that they are cut into, in both models; none is the number of heads, which must then be the same.
    """

    name: ClassVar[str] = "relations"
    summary: ClassVar[str] = "KL divergence of how values, queries or keys of tokens relate to each other"
    source: ClassVar[str] = "MiniLM (Wang et al. 2020), eq. 7 and 8; heads: MiniLMv2 (Wang et al. 2021), section 3"

    of: Literal["value", "query", "key"] = "value"
    heads: int | None = None

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        heads = {anatomy.num_heads(self.of) for anatomy in (student, teacher)} if self.heads is None else {self.heads}
        if len(heads) != 1:
            raise DistillError(f"{self.name}: the models have {sorted(heads)} heads; say heads=... for both")
        parts = heads.pop()
        for anatomy in (student, teacher):
            _ = anatomy.layout  # raises where it is not known
            width = anatomy.hidden_size // anatomy.num_heads("query") * anatomy.num_heads(self.of)
            if parts < 1 or width % parts:
                raise DistillError(
                    f"{self.name}: {width} values of the {anatomy.role}'s {self.of} have no {parts} equal parts"
                )
        pairs = same_roles(self.layer_pairs(student, teacher), self.of)
        return tuple(Comparison(ours, theirs, "token", partial(_compare, parts)) for ours, theirs in pairs)
