"""Tied factors: telling transformers which parameters are the same, so that they are stored once and tied again."""

import re

from transformers import PreTrainedModel

from compresskit.hub.names import Model
from compresskit.surgery.layout import layout_of


def tie_factors_(model: Model) -> None:
    """Name every shared factor in `_tied_weights_keys` of this instance, and drop dense names that are gone.

    transformers ties by name and keeps the names on the class; an attribute of the instance overrides them. Run it
    after modules were swapped, in either direction: dense names come back with their layers.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in parts:
        dense = part.__dict__.setdefault("_dense_tied_weights_keys", part._tied_weights_keys) or {}
        names = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        names |= {name for name, _ in part.named_buffers(remove_duplicate=False)}
        keys = {t: s for t, s in dense.items() if _matches(t, names) and _matches(s, names)}
        keys |= {_pattern(t, names): _pattern(s, names) for t, s in shared_factors(part).items()}
        part._tied_weights_keys = keys or None
    for part in parts:  # the names of inner models count for outer ones, so they come first
        part.all_tied_weights_keys = {**part.get_expanded_tied_weights_keys(all_submodels=True), **shared_factors(part)}


def shared_factors(model: Model) -> dict[str, str]:
    """Parameter name -> name of the same parameter in the first module that holds it."""
    layout = layout_of(model)
    keys = {name: model.get_submodule(name).factor_keys() for name in layout}
    return {
        f"{name}.{keys[name][factor]}": f"{owner}.{keys[owner][factor]}"
        for name, entry in layout.items()
        for factor, owner in entry.shares.items()
    }


def _matches(pattern: str, names: set[str]) -> bool:
    """True if transformers finds parameters of this name, which may be an expression or a module."""
    return pattern in names or any(re.search(f"^{pattern}", name) for name in names)


def _pattern(name: str, names: set[str]) -> str:
    """The name itself, or an expression if other names begin alike (core1, core10): transformers matches prefixes."""
    if any(other != name and other.startswith(name) for other in names):
        return f"(?:{re.escape(name)})$"
    return name
