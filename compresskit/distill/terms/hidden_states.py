"""Hidden states: what each layer returns."""

from dataclasses import dataclass
from typing import ClassVar, final

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.loss import Comparison, LayerLoss, Projected, projection_sizes, register, same_roles
from compresskit.distill.terms.embeddings import compare_states


@register
@final
@dataclass(frozen=True, kw_only=True)
class HiddenStates(LayerLoss):
    """Mean squared difference of hidden states, per real token, added up over the layers.

    Args:
        projection: linear learns one map for all layers from the student's hidden size to the teacher's; needed where
            they differ.
    """

    name: ClassVar[str] = "hidden-states"
    summary: ClassVar[str] = "mean squared difference of what each layer returns"
    source: ClassVar[str] = "TinyBERT (Jiao et al. 2020), eq. 8"

    projection: Projected = "none"

    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        sizes = projection_sizes(self.name, self.projection, student, teacher)
        pairs = same_roles(self.layer_pairs(student, teacher), "hidden")
        return tuple(Comparison(ours, theirs, "token", compare_states, sizes) for ours, theirs in pairs)
