"""Names in files and names in models.

Files keep the names of the hub. transformers renames modules from time to time, translates when it loads, and
translates back when it saves; a checkpoint of one class may also be opened as another, with the base model's prefix
more or less. The map follows the tensors through all of that, by transformers' own rules.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from compresskit.core.modules import FactorizedModule
from compresskit.errors import CheckpointError
from compresskit.surgery.layout import Entry, Layout, layout_of

Model = Any
"""A transformers PreTrainedModel, which has no types."""


def reader(model: Model) -> Callable[[str], str]:
    """Name of a tensor in a file -> its name in this model, or one that this model does not have."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def read(key: str) -> str:
        name: str = rename_source_key(key, renamings, converters, prefix, state)[0]
        if name not in state:
            plain: str = rename_source_key(key, [], [], prefix, state)[0]
            return plain if plain in state else name
        return name

    return read


def stored_layout(model: Model) -> dict[str, Entry]:
    """The layout in the names of files. Decides under which names this model is saved from now on."""
    layout = layout_of(model)
    if not _reversible(model, layout):
        model._weight_conversions = []  # save under the model's own names
    stored = _written(model, [f"{name}.weight" for name in layout])
    names = {name: stored[f"{name}.weight"].removesuffix(".weight") for name in layout}
    return {
        names[name]: Entry(entry.structure, {factor: names[owner] for factor, owner in entry.shares.items()})
        for name, entry in layout.items()
    }


def _reversible(model: Model, layout: Layout) -> bool:
    """True if every factor finds its way back from the hub's names; not where transformers fuses or cuts tensors."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in conversions):
        return False
    factors = [f"{name}.{key}" for name in layout for key, _ in model.get_submodule(name).named_parameters()]
    marks = [f"{name}.weight" for name in layout]
    stored, read = _written(model, [*factors, *marks]), reader(model)
    stems = {mark: mark.removeprefix(f"{model.base_model_prefix}.") for mark in marks}
    return all(read(stored[key]) == key for key in factors) and all(
        stored[mark].endswith(".weight") and read(stored[mark]).endswith(stem) for mark, stem in stems.items()
    )


def _written(model: Model, keys: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in this model -> its name in a file that is saved now."""
    tensors = {key: torch.empty(0) for key in keys}
    names = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(tensors)).items()}
    return {key: names[id(tensor)] for key, tensor in tensors.items()}


def resolve_names(model: Model, layout: Layout) -> dict[str, Entry]:
    """A layout from a file in the names of this dense model, without the heads that its class lacks.

    Raises:
        CheckpointError: a module is missing that is no head of another class, or all are.
    """
    read, state = reader(model), model.state_dict()
    names = {name: read(f"{name}.weight").removesuffix(".weight") for name in layout}
    absent = [name for name, here in names.items() if f"{here}.weight" not in state]
    lost = [name for name in absent if len(absent) == len(layout) or not _is_of_other_class(model, names[name])]
    if lost:
        raise CheckpointError(
            f"the map does not fit the model: it names {', '.join(map(repr, lost[:3]))}"
            f"{' and more' if lost[3:] else ''}, which {type(model).__name__} with this configuration does not have"
        )
    return {
        names[name]: Entry(entry.structure, {factor: names.get(owner, owner) for factor, owner in entry.shares.items()})
        for name, entry in layout.items()
        if name not in absent
    }


def _is_of_other_class(model: Model, name: str) -> bool:
    """True if a checkpoint of another class may have this module: a head, or a pooler that is None here."""
    if type(model).__name__ in (model.config.architectures or []):
        return False
    first = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    if hasattr(model.base_model, first):
        return getattr(model.base_model, first) is None
    return not name.startswith(f"{model.base_model_prefix}.")


def factor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a factorised module: factors, biases, padding rows."""
    return {
        f"{name}.{key}": tuple(parameter.shape)
        for name, module in model.named_modules()
        if isinstance(module, FactorizedModule)
        for key, parameter in module.named_parameters()
    }
