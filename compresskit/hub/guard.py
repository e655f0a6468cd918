"""The guard against silent random weights.

Without `import compresskit`, transformers warns of an unknown quantization method, finds no dense weights and
initialises them at random. So every replaced weight leaves a sentinel in the file: a tensor of one element under the
name of the dense weight, on which plain transformers stops because the shapes differ. We ignore them.

The file keeps its usual name, since `Trainer` looks for it when it resumes. A caller who passes
`ignore_mismatched_sizes=True` without compresskit switches the guard off and gets a report of each layer instead.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from compresskit.hub.names import Model
from compresskit.surgery.layout import layout_of

SHAPE = (1,)


def sentinels(model: Model) -> dict[str, Tensor]:
    """Name of each dense weight that was replaced -> a tensor that no dense layer can take; tied weights have one."""
    marks: dict[str, Tensor] = {}
    for name, entry in layout_of(model).items():
        factors = model.get_submodule(name).factors()
        if set(entry.shares) != set(factors):
            marks[f"{name}.weight"] = torch.zeros(SHAPE, dtype=next(iter(factors.values())).dtype)
    return marks


def ignore_sentinels_(model: Model, names: Iterable[str]) -> None:
    """Keep sentinels of these modules out of the loading report; with and without the base model's prefix."""
    stems = [re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in names]
    if stems:
        pattern = rf"(^|\.)({'|'.join(stems)})\.weight$"
        known = model._keys_to_ignore_on_load_unexpected
        same = set if isinstance(known, set) else list  # lists in the first releases of transformers 5
        model._keys_to_ignore_on_load_unexpected = same([*(known or ()), pattern])
