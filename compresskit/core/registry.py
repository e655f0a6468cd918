"""The registry of decompositions and of the structures that they fit.

A decomposition registers itself with `@register` when its file is imported. compresskit imports its own files;
other packages name theirs in the entry-point group `compresskit.decompositions`.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from compresskit.core.decomposition import Decomposition
from compresskit.core.structure import Structure
from compresskit.errors import CheckpointError, OptionError, StructureError, UnknownNameError
from compresskit.options import parse_options
from compresskit.registration import check_class, class_path, is_frozen_dataclass, refusal, suggestion

D = TypeVar("D", bound=type[Decomposition])

ENTRY_POINT_GROUP = "compresskit.decompositions"
MAX_SIDE = 2**31 - 1
"""No size in a checkpoint may be larger."""

_decompositions: dict[str, type[Decomposition]] = {}
_structures: dict[str, type[Structure]] = {}


def register(cls: D) -> D:
    """Class decorator: check the contract of a decomposition and make it known by its name.

    Raises:
        OptionError: the class breaks the contract; the message says where.
    """
    _check_contract(cls)
    known = _decompositions.get(cls.name)
    if known is not None and class_path(known) != class_path(cls):
        raise OptionError(f"two decompositions are called {cls.name!r}: {known.__module__} and {cls.__module__}")
    for structure in cls.structures:
        other = _structures.get(structure.kind)
        if other is not None and class_path(other) != class_path(structure):
            raise OptionError(f"two structures are of kind {structure.kind!r}: {other} and {structure}")
    _decompositions[cls.name] = cls
    _structures.update({structure.kind: structure for structure in cls.structures})
    return cls


def _check_contract(cls: type[Decomposition]) -> None:
    check_class(cls, Decomposition, ("name", "summary", "source", "structures"))
    for structure in cls.structures:
        if not (inspect.isclass(structure) and issubclass(structure, Structure) and getattr(structure, "kind", None)):
            raise refusal(cls, f"{structure!r} is not a Structure with a kind")
        if inspect.isabstract(structure):
            raise refusal(cls, f"{structure!r} lacks {', '.join(sorted(structure.__abstractmethods__))}")
        if not is_frozen_dataclass(structure):
            raise refusal(cls, f"{structure!r} is not a frozen dataclass")


@cache
def _load_plugins() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


def decompositions() -> Mapping[str, type[Decomposition]]:
    """All decompositions by name, those of other installed packages included."""
    _load_plugins()
    return dict(sorted(_decompositions.items()))


def decomposition(name: str, options: Mapping[str, Any] | None = None) -> Decomposition:
    """The decomposition of this name with options given as text, as on the command line, or as values.

    Raises:
        UnknownNameError: no such decomposition or option; names the nearest one.
        OptionError: a value that the option cannot take.
    """
    known = decompositions()
    if name not in known:
        raise UnknownNameError(f"no decomposition is called {name!r}{suggestion(name, known)}")
    return parse_options(known[name], options or {})


def structure_from_json(data: Mapping[str, Any]) -> Structure:
    """The structure that `Structure.to_json` wrote; nothing is allocated.

    Raises:
        CheckpointError: unknown kind, missing or unknown fields, or sizes that are not sane integers.
    """
    _load_plugins()
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise CheckpointError(f"a structure is an object with a 'kind', got {data!r}")
    cls = _structures.get(data["kind"])
    if cls is None:
        raise CheckpointError(
            f"unknown structure kind {data['kind']!r}{suggestion(data['kind'], _structures)}. It may come from a "
            "plug-in that is not installed here"
        )
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {key: _sizes(value, key) for key, value in data.items() if key != "kind"}
    if set(given) != fields:
        raise CheckpointError(f"structure {data['kind']!r} has fields {sorted(fields)}, got {sorted(map(str, given))}")
    try:
        return cls(**given)
    except (StructureError, TypeError) as error:
        raise CheckpointError(f"structure {dict(data)!r} is impossible: {error}") from error


def _sizes(value: Any, key: str, depth: int = 2) -> Any:
    if isinstance(value, list | tuple):
        if depth == 0:
            raise CheckpointError(f"the size {key!r} of a structure is nested too deeply to be one")
        return tuple(_sizes(item, key, depth - 1) for item in value)
    if type(value) is not int or not 0 <= value <= MAX_SIDE:
        raise CheckpointError(f"the size {key!r} of a structure is {value!r}; integers from 0 to {MAX_SIDE} are sane")
    return value
