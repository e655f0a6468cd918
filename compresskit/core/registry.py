"""The registry of decompositions and of the structures that they fit.

A decomposition registers itself with `@register` when its file is imported. compresskit imports its own files;
other packages name theirs in the entry-point group `compresskit.decompositions`.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from compresskit.core.decomposition import Decomposition
from compresskit.core.options import check_options, parse_options
from compresskit.core.structure import Structure
from compresskit.errors import CheckpointError, OptionError, StructureError, UnknownNameError

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
    if known is not None and _path(known) != _path(cls):
        raise OptionError(f"two decompositions are called {cls.name!r}: {known.__module__} and {cls.__module__}")
    for structure in cls.structures:
        other = _structures.get(structure.kind)
        if other is not None and _path(other) != _path(structure):
            raise OptionError(f"two structures are of kind {structure.kind!r}: {other} and {structure}")
    _decompositions[cls.name] = cls
    _structures.update({structure.kind: structure for structure in cls.structures})
    return cls


def _path(cls: type) -> tuple[str, str]:
    """What identifies a class even if its module is loaded twice."""
    return cls.__module__, cls.__qualname__


def _check_contract(cls: type[Decomposition]) -> None:
    def refuse(reason: str) -> OptionError:
        return OptionError(f"{cls.__module__}.{cls.__qualname__} cannot be registered: {reason}")

    if not (inspect.isclass(cls) and issubclass(cls, Decomposition)):
        raise OptionError(f"{cls!r} is not a subclass of Decomposition")
    if inspect.isabstract(cls):
        raise refuse(f"it lacks {', '.join(sorted(cls.__abstractmethods__))}")
    for attribute in ("name", "summary", "source", "structures"):
        if not getattr(cls, attribute, None):
            raise refuse(f"it has no {attribute}")
    if not (isinstance(cls.name, str) and re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name)):
        raise refuse(f"the name {cls.name!r} is not lower case with single dashes")
    if not _is_frozen_dataclass(cls):
        raise refuse("it is not a frozen dataclass")
    check_options(cls)
    for structure in cls.structures:
        if not (inspect.isclass(structure) and issubclass(structure, Structure) and getattr(structure, "kind", None)):
            raise refuse(f"{structure!r} is not a Structure with a kind")
        if inspect.isabstract(structure):
            raise refuse(f"{structure!r} lacks {', '.join(sorted(structure.__abstractmethods__))}")
        if not _is_frozen_dataclass(structure):
            raise refuse(f"{structure!r} is not a frozen dataclass")


def _is_frozen_dataclass(cls: type) -> bool:
    """Whether the class itself is one; a base class that is does not know the fields of its subclass."""
    return "__dataclass_fields__" in vars(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@cache
def _load_plugins() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


def decompositions() -> Mapping[str, type[Decomposition]]:
    """All decompositions by name, those of other installed packages included."""
    _load_plugins()
    return dict(sorted(_decompositions.items()))


def decomposition(name: str, options: Mapping[str, str] | None = None) -> Decomposition:
    """The decomposition of this name with options given as text, as on the command line.

    Raises:
        UnknownNameError: no such decomposition or option; names the nearest one.
        OptionError: a value that the option cannot take.
    """
    known = decompositions()
    if name not in known:
        raise UnknownNameError(f"no decomposition is called {name!r}{suggestion(name, known)}")
    return parse_options(known[name], options or {})


def suggestion(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean ...? Known: ...` for an error message."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"


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
