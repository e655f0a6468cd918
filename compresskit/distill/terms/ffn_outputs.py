"""FFN outputs: what each feed-forward network returns before the residual is added."""

from dataclasses import dataclass
from typing import ClassVar, final

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.loss import Comparison, LayerLoss, Projected, projection_sizes, register, same_roles
from compresskit.distill.terms.embeddings import compare_states


@register
@final
@dataclass(frozen=True, kw_only=True)
class FfnOutputs(LayerLoss):
    """Mean squared difference of FFN outputs, per real token, added up over the layers.

    The paper does not say whether it means this or the state after residual and normalisation; that is `hidden-states`.

    Args:
        projection: linear learns one map for all layers from the student's hidden size to the teacher's; needed where
            they differ.
    """

    name: ClassVar[str] = "ffn-outputs"
    summary: ClassVar[str] = "mean squared difference of what each feed-forward network returns, before the residual"
    source: ClassVar[str] = "KroneckerBERT (Tahaei et al. 2022), eq. 14"

    projection: Projected = "none"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        for anatomy in (student, teacher):
            _ = anatomy.layout  # raises where it is not known
        sizes = projection_sizes(self.name, self.projection, student, teacher)
        pairs = same_roles(self.layer_pairs(student, teacher), "ffn")
        return tuple(Comparison(ours, theirs, "token", compare_states, sizes) for ours, theirs in pairs)
