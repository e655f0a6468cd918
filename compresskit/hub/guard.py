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
from compresskit.surgery.layout import Layout, layout_of

SHAPE = (1,)


def sentinel_names(layout: Layout) -> dict[str, str]:
    """Name of the dense weight -> module, for each module of a layout that owns a factor; tied weights count once."""
    return {
        f"{name}.weight": name
        for name, entry in layout.items()
        if set(entry.shares) != set(entry.structure.factor_specs())
    }


def sentinels(model: Model) -> dict[str, Tensor]:
    """Name of each dense weight that was replaced -> a tensor that no dense layer can take."""
    return {
        weight: torch.zeros(SHAPE, dtype=next(model.get_submodule(name).parameters()).dtype)
        for weight, name in sentinel_names(layout_of(model)).items()
    }


def ignore_sentinels_(model: Model, names: Iterable[str]) -> None:
    """Keep the sentinels of these names out of the loading report, with and without the base model's prefix."""
    stems = [re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in names]
    if stems:
        known = model._keys_to_ignore_on_load_unexpected
        same = set if isinstance(known, set) else list  # lists in the first releases of transformers 5
        pattern = rf"(^|\.)({'|'.join(stems)})$"
        model._keys_to_ignore_on_load_unexpected = same([*(known or ()), pattern])
