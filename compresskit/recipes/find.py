"""Presets by name: each file of `compresskit/recipes/presets` is one, and so is any file that a user has edited."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compresskit.errors import OptionError, UnknownNameError
from compresskit.recipes.definition import Preset, preset_from_data
from compresskit.registration import suggestion
from compresskit.tables import read_tables

FOLDER = Path(__file__).with_name("presets")
VARIANT = re.compile(r'^variant\s*=\s*"[^"\n]*"', re.MULTILINE)


def presets() -> dict[str, Preset]:
    """The presets that come with compresskit by `name` or `name:variant`, every variant by itself."""
    found: dict[str, Preset] = {}
    for path in _files():
        variants: list[str | None] = [*_variants(path)]
        for variant in variants or [None]:
            made = _read(path, variant, path.stem)
            found[made.title] = made
    return found


def preset(which: str | Path) -> Preset:
    """The preset `name` or `name:variant`, or that in a TOML file, perhaps edited.

    Raises:
        UnknownNameError: no such preset or variant; names the nearest. A key of the file that no preset has.
        OptionError: the file is not TOML, or a value does not fit.
    """
    path, variant = _located(which)
    return _read(path, variant, str(which) if path.parent != FOLDER else f"preset {path.stem}")


def preset_text(which: str | Path) -> str:
    """The file of a preset with its comments, the variant chosen: to look at, edit and pass back.

    Raises:
        UnknownNameError, OptionError: as `preset`.
    """
    path, variant = _located(which)
    preset(which)
    return _choose(path.read_text("utf-8"), variant)


def _files() -> list[Path]:
    return sorted(FOLDER.glob("*.toml"))


def _located(which: str | Path) -> tuple[Path, str | None]:
    """The file, and the variant that is asked for beside what the file says."""
    text = str(which)
    name, colon, variant = text.rpartition(":")
    for path, chosen in ((text, None), *([(name, variant)] if colon else [])):
        own = FOLDER / f"{path}.toml"
        if re.fullmatch(r"[a-z0-9-]+", path) and own.is_file():
            return own, chosen
        if path.endswith(".toml"):
            if not Path(path).expanduser().is_file():
                raise UnknownNameError(f"there is no preset file {path}")
            return Path(path).expanduser(), chosen
    known = [file.stem for file in _files()]
    raise UnknownNameError(
        f"no preset is called {text!r}{suggestion(name or text, known)}. A file of your own ends in .toml"
    )


def _variants(path: Path) -> list[str]:
    return sorted(_tables(path.read_text("utf-8"), str(path)).get("variants", {}))


def _read(path: Path, variant: str | None, where: str) -> Preset:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    data = _tables(text, where)
    if variant is not None:
        _check_variant(variant, data.get("variants", {}), where)
        data["variant"] = variant
    return preset_from_data(data, where)


def _check_variant(variant: str, known: Iterable[str], where: str) -> None:
    if variant not in known:
        raise UnknownNameError(f"{where} has no variant {variant!r}{suggestion(variant, known)}")


def _tables(text: str, where: str) -> dict[str, Any]:
    try:
        return read_tables(text)
    except ValueError as error:
        raise OptionError(f"{where} is not TOML: {error}") from error


def _choose(text: str, variant: str | None) -> str:
    return text if variant is None else VARIANT.sub(f'variant = "{variant}"', text, count=1)
