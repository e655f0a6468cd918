"""What every registry here asks of the classes that register themselves, and how it answers to an unknown name."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from compresskit.errors import OptionError
from compresskit.options import check_options


def check_class(cls: Any, base: type, attributes: Sequence[str]) -> None:
    """Check that a class can be registered: a concrete frozen dataclass below `base` with a name and text options.

    Args:
        attributes: class attributes that must be there and not empty; `name` is one of them.

    Raises:
        OptionError: it cannot; says why.
    """
    if not _is_below(cls, base):
        raise OptionError(f"{cls!r} is not a subclass of {base.__name__}")
    if inspect.isabstract(cls):
        raise refusal(cls, f"it lacks {', '.join(sorted(cls.__abstractmethods__))}")
    for attribute in attributes:
        if not getattr(cls, attribute, None):
            raise refusal(cls, f"it has no {attribute}")
    if not (isinstance(cls.name, str) and re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name)):
        raise refusal(cls, f"the name {cls.name!r} is not lower case with single dashes")
    if not is_frozen_dataclass(cls):
        raise refusal(cls, "it is not a frozen dataclass")
    check_options(cls)


def _is_below(cls: Any, base: type) -> bool:
    return inspect.isclass(cls) and issubclass(cls, base)


def refusal(cls: type, reason: str) -> OptionError:
    """The error that a class cannot be registered."""
    return OptionError(f"{cls.__module__}.{cls.__qualname__} cannot be registered: {reason}")


def is_frozen_dataclass(cls: type) -> bool:
    """Whether the class itself is one; a base class that is does not know the fields of its subclass."""
    return "__dataclass_fields__" in vars(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


def class_path(cls: type) -> tuple[str, str]:
    """What identifies a class even if its module is loaded twice."""
    return cls.__module__, cls.__qualname__


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...? Known: ...` for an error message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(names) or 'none'}"
