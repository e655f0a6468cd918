"""Module names across classes: a checkpoint of one class is opened as another, so names gain or lose a prefix."""

from typing import Any

from compresskit.errors import CheckpointError
from compresskit.surgery.layout import Entry, Layout

Model = Any
"""A transformers PreTrainedModel, which has no types."""


def spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A name as it is, without `base_model_prefix`, and with it."""
    if not prefix:
        return (name,)
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def resolve_names(model: Model, layout: Layout) -> dict[str, Entry]:
    """The layout in the names of this model, without the heads that its class lacks.

    Raises:
        CheckpointError: a name that belongs to the model's body is missing there.
    """
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found: dict[str, str] = {}
    for name in layout:
        here = next((spelling for spelling in spellings(name, model.base_model_prefix) if spelling in modules), None)
        if here is not None:
            found[name] = here
        elif _in_body(model, name):
            raise CheckpointError(
                f"the map does not fit the model: it names {name!r}, which {type(model).__name__} with this "
                "configuration does not have"
            )
    return {
        here: Entry(layout[name].structure, {factor: found.get(o, o) for factor, o in layout[name].shares.items()})
        for name, here in found.items()
    }


def _in_body(model: Model, name: str) -> bool:
    """True if the name starts below the base model; what starts elsewhere is a head of another class."""
    first = name.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first in dict(model.base_model.named_children())
