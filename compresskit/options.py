"""Options of a registered piece as text: what `--set key=value` means is read off the dataclass itself."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from compresskit.errors import OptionError, UnknownNameError

D = TypeVar("D")


def option_types(cls: type) -> dict[str, Any]:
    """Type of each option field of a registered class."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def check_options(cls: type) -> None:
    """Raise OptionError unless every option has a default and a type that can be written as text."""
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            raise OptionError(f"option {field.name!r} of {cls.__qualname__} has no default")
    for name, hint in option_types(cls).items():
        if not _readable(hint):
            raise OptionError(f"option {name!r} of {cls.__qualname__} has type {hint}, which has no text form")


def parse_options(cls: type[D], options: Mapping[str, Any]) -> D:
    """`cls` with its options read from text, or from values as they are.

    Raises:
        UnknownNameError: an option that `cls` does not have.
        OptionError: a value that does not fit the option's type, or that `cls` itself refuses.
    """
    known = option_types(cls)
    for name in options:
        if name not in known:
            listed = ", ".join(f"{key} ({describe(hint)})" for key, hint in known.items()) or "none"
            raise UnknownNameError(
                f"{getattr(cls, 'name', cls.__name__)} has no option {name!r}; its options: {listed}"
            )
    texts = {name: value if isinstance(value, str) else option_text(value) for name, value in options.items()}
    return cls(**{name: _parse(text, known[name], name) for name, text in texts.items()})


def option_text(value: Any) -> str:
    """The text that `parse_options` reads back as `value`."""
    if isinstance(value, (tuple, list)):
        return "x".join(str(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def describe_options(cls: type) -> dict[str, tuple[str, str]]:
    """Option name -> (its type for people, its default as text)."""
    hints = option_types(cls)
    return {f.name: (describe(hints[f.name]), option_text(f.default)) for f in dataclasses.fields(cls) if f.init}


def describe(hint: Any) -> str:
    """A type for people: `integer`, `2 integers as AxB`, `left or right`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else describe(arg) for arg in args)
    if origin is tuple:
        return (
            "integers as AxBx..."
            if args[-1] is Ellipsis
            else f"{len(args)} integers as {'x'.join('ABCDEF'[: len(args)])}"
        )
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[hint]


def _readable(hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(isinstance(arg, str) for arg in args)
    if origin in (typing.Union, types.UnionType):
        kinds = [arg for arg in args if arg is not type(None)]
        return len(kinds) == 1 and _readable(kinds[0])  # of two kinds, a text does not say which it means
    if origin is tuple:
        return all(arg in (int, Ellipsis) for arg in args)
    return hint in (int, float, bool, str)


def _parse(text: str, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(text, next(arg for arg in args if arg is not type(None)), name)
    refusal = OptionError(f"option {name!r} takes {describe(hint)}, got {text!r}")
    if origin is Literal:
        if text not in args:
            raise refusal
        return text
    try:
        if origin is tuple:
            items = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
            if args[-1] is not Ellipsis and len(items) != len(args):
                raise refusal
            return items
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        return hint(text)
    except (ValueError, KeyError):
        raise refusal from None
