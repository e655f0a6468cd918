"""Machines by name or file, and as plain data."""

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from compresskit.core.cost import ELEMENT_BYTES, Machine, Rates, Speeds
from compresskit.errors import OptionError, UnknownNameError
from compresskit.registration import suggestion
from compresskit.tables import read_tables, table_text

FOLDER = Path(__file__).parent
DEFAULT = "cpu"
DEFAULTS = {"bfloat16": "cpu-bf16"}
"""The machine that plans are made for unless one is named, by the type of the model's weights; `DEFAULT` for others."""

MAY_BE_ZERO = {"layer_s", "half_m", "half_n", "half_k"}
RATES = ("single", "batched", "vector")
SPEED_KEYS = tuple(f.name for f in fields(Speeds) if f.name != "element_bytes")
KEYS = ("name", "about", "dtype", "notable_s", "tiny_s", "dense", "factorised", "kinds")


def machines() -> dict[str, Machine]:
    """The machines that come with compresskit, by name; the default first."""
    found = {path.stem: machine(path.stem) for path in sorted(FOLDER.glob("*.toml"))}
    return {DEFAULT: found[DEFAULT], **found}


def machine(which: str | Path | Machine = DEFAULT) -> Machine:
    """The machine of a name, or that in a TOML file; a machine is itself.

    Raises:
        UnknownNameError: no such machine or file, names the nearest; a key of the file that no machine has.
        OptionError: the file is not TOML, lacks a key, or a value does not fit.
    """
    if isinstance(which, Machine):
        return which
    path = _path(str(which))
    where = f"machine {path.stem}" if path.parent == FOLDER else str(which)
    try:
        data = read_tables(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise OptionError(f"{where} is not TOML: {error}") from error
    return machine_from_data(data, where)


def machine_for(dtype: str) -> Machine:
    """The machine that models with weights of this type are planned for unless another is named."""
    return machine(DEFAULTS.get(dtype, DEFAULT))


def machine_from_data(data: Any, where: str) -> Machine:
    """The machine that `machine_to_data` wrote down.

    Args:
        where: it comes from, for errors.

    Raises:
        UnknownNameError: a key that no machine has.
        OptionError: a key is missing, or a value does not fit.
    """
    table = _table(data, KEYS, where, optional=("factorised", "kinds"))
    name, about, dtype = (_text(table[key], key, where) for key in ("name", "about", "dtype"))
    if dtype not in ELEMENT_BYTES:
        raise OptionError(f"{where}: dtype is {', '.join(ELEMENT_BYTES)}, got {dtype!r}")
    num_bytes = ELEMENT_BYTES[dtype]
    dense = _speeds(table["dense"], num_bytes, f"{where}: dense")
    own = "factorised" in table
    factorised = _speeds(table["factorised"], num_bytes, f"{where}: factorised") if own else dense
    kinds = table.get("kinds", {})
    if not isinstance(kinds, Mapping):
        raise OptionError(f"{where}: kinds are tables, got {kinds!r}")
    by_kind = {str(kind): _speeds(value, num_bytes, f"{where}: kinds.{kind}") for kind, value in kinds.items()}
    notable_s, tiny_s = (_number(table[key], key, where, zero=True) for key in ("notable_s", "tiny_s"))
    return Machine(name, about, dtype, notable_s, tiny_s, dense, factorised, tuple(by_kind.items()))


def machine_to_data(made: Machine) -> dict[str, Any]:
    """Plain data, which reads back with `machine_from_data`."""
    data = {key: getattr(made, key) for key in ("name", "about", "dtype", "notable_s", "tiny_s")}
    data["dense"] = _speeds_data(made.dense)
    if made.factorised != made.dense:
        data["factorised"] = _speeds_data(made.factorised)
    return {**data, "kinds": {kind: _speeds_data(speeds) for kind, speeds in made.kinds}} if made.kinds else data


def machine_text(made: Machine) -> str:
    """A TOML file to keep, edit and name."""
    return table_text(machine_to_data(made))


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _path(which: str) -> Path:
    own = FOLDER / f"{which}.toml"
    if re.fullmatch(r"[a-z0-9-]+", which) and own.is_file():
        return own
    if which.endswith(".toml"):
        path = Path(which).expanduser()
        if not path.is_file():
            raise UnknownNameError(f"there is no machine file {which}")
        return path
    known = [path.stem for path in sorted(FOLDER.glob("*.toml"))]
    raise UnknownNameError(
        f"no machine is called {which!r}{suggestion(which, known)}. A file of your own ends in .toml; "
        "compresskit machines --measure makes one"
    )


def _speeds(data: Any, num_bytes: int, where: str) -> Speeds:
    table = _table(data, SPEED_KEYS, where)
    values: dict[str, Any] = {
        key: _rates(value, f"{where}.{key}") if key in RATES else _number(value, key, where, zero=key in MAY_BE_ZERO)
        for key, value in table.items()
    }
    return Speeds(**values, element_bytes=num_bytes)


def _rates(data: Any, where: str) -> Rates:
    table = _table(data, tuple(f.name for f in fields(Rates)), where)
    return Rates(**{key: _number(value, key, where, zero=key in MAY_BE_ZERO) for key, value in table.items()})


def _speeds_data(speeds: Speeds) -> dict[str, Any]:
    data = asdict(speeds)
    return {key: data[key] for key in SPEED_KEYS if key not in RATES} | {key: data[key] for key in RATES}


def _table(data: Any, keys: tuple[str, ...], where: str, *, optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A table that has these keys and no others."""
    if not isinstance(data, Mapping):
        raise OptionError(f"{where} is no table but {data!r}")
    for key in data:
        if key not in keys:
            raise UnknownNameError(f"{where} has a key {key!r} that no machine has{suggestion(str(key), keys)}")
    if missing := [key for key in keys if key not in data and key not in optional]:
        raise OptionError(f"{where} lacks {', '.join(missing)}")
    return data


def _text(value: Any, key: str, where: str) -> str:
    if not (isinstance(value, str) and value):
        raise OptionError(f"{where}: {key} is a text, got {value!r}")
    return value


def _number(value: Any, key: str, where: str, *, zero: bool) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (sound and (value > 0 or (zero and value == 0))):
        raise OptionError(f"{where}: {key} is a number {'of at least' if zero else 'above'} 0, got {value!r}")
    return float(value)
