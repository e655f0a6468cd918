"""Nested tables: merged, changed by dotted name, and written as TOML."""

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from compresskit.errors import OptionError
from compresskit.registration import suggestion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = Mapping[str, Any]


def merged(table: Table, other: Table) -> dict[str, Any]:
    """`table` with the values of `other`; tables in both are merged, all else is replaced."""
    result = dict(table)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def set_value(table: Table, name: str, value: Any) -> dict[str, Any]:
    """`table` with the value at a dotted name, and without what `tasks` beside it says for single tasks.

    In a list of tables the next part is the `name` of one of them, as in `corpus.loss.hidden-states.weight`.

    Raises:
        OptionError: a part of the name is no table, or none in the list.
    """
    key, _, rest = name.partition(".")
    if not rest:
        tasks = {task: {k: v for k, v in own.items() if k != key} for task, own in table.get("tasks", {}).items()}
        without = {} if value is not None else {key}
        result = {k: v for k, v in {**table, key: value}.items() if k not in without}
        return {**result, "tasks": tasks} if tasks else result
    inner = table.get(key, {})
    if _is_block(key, inner):
        return {**table, key: _set_in_list(inner, rest, value)}
    if not isinstance(inner, Mapping):
        raise OptionError(f"{key!r} is no table but {inner!r}, so there is no {name!r}")
    return {**table, key: set_value(inner, rest, value)}


def _set_in_list(tables: list[Table], name: str, value: Any) -> list[Table]:
    wanted, _, rest = name.partition(".")
    names = [str(table.get("name")) for table in tables]
    if wanted not in names:
        raise OptionError(f"there is no loss {wanted!r} here{suggestion(wanted, names)}")
    if not rest:
        raise OptionError(f"{name!r} names a loss but none of its options, as {name}.weight does")
    return [set_value(table, rest, value) if own == wanted else table for table, own in zip(tables, names, strict=True)]


def read_tables(text: str) -> dict[str, Any]:
    """Nested tables of a TOML file; a ValueError says where it is none."""
    tables: dict[str, Any] = tomllib.loads(text)
    return tables


def value_of(text: str) -> Any:
    """The value that TOML writes so; a text that is no value of TOML is itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def table_text(table: Table, name: str = "") -> str:
    """TOML: plain values first, then tables, then lists of tables that are not rules on one line each."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping) and not _is_block(k, v)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    blocks = [f"[{name}]\n" + "\n".join(lines) if name else "\n".join(lines)] if lines or not table else []
    for key, value in table.items():
        full = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, Mapping):
            blocks.append(table_text(value, full).rstrip("\n"))
        elif _is_block(key, value):
            blocks += [table_text(item, f"[{full}]").rstrip("\n") for item in value]
    return "\n\n".join(blocks) + "\n"


def _is_block(key: str, value: Any) -> bool:
    return key == "loss" and isinstance(value, list)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    """Numbers, texts and lists read the same in JSON and in TOML; a table in a line does not."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        items = [_value(item) for item in value]
        inside = (
            f"\n    {(',' + chr(10) + '    ').join(items)},\n" if any(isinstance(i, Mapping) for i in value) else ""
        )
        return f"[{inside or ', '.join(items)}]"
    if isinstance(value, float) and abs(value) >= 1e6 and float(short := f"{value:.6e}") == value:
        return re.sub(r"\.?0*e\+0*", "e", short)
    return json.dumps(value, ensure_ascii=False)
