"""Suites: TOML files with one `[[experiment]]` table each, read into experiments.

A table has a `name`, a `kind` and the options of that kind. In `[experiment.each]` an option has a list of values:
one experiment for each combination, named `<name>-<value>-<value>`.
"""

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from benchmarks.experiments import Experiment, SuiteError, make_experiment, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITES = Path(__file__).parent / "suites"
UNNAMED = str.maketrans("=,", "--")
"""Characters of options that stand for dashes in names of files."""


@final
@dataclass(frozen=True)
class Entry:
    """An experiment of a suite; its result is `<results>/<suite>/<name>.json`."""

    suite: str
    name: str
    experiment: Experiment

    def path(self, results: Path) -> Path:
        return results / self.suite / f"{self.name}.json"


def suite_names(folder: Path = SUITES) -> list[str]:
    """Names of the suites in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def read_suite(name: str, folder: Path = SUITES) -> list[Entry]:
    """The experiments of a suite, in the order of its file.

    Raises:
        SuiteError: no such suite, or its file cannot be read as one; says where and what would do.
    """
    path = folder / f"{nearest(name, suite_names(folder), 'suite')}.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("experiment", [])
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path.name} is not TOML: {error}") from error
    if not isinstance(tables, list) or not tables:
        raise SuiteError(f"{path.name} has no [[experiment]] table")
    entries: list[Entry] = []
    for table in tables:
        for entry_name, options in _expand(table, path.name):
            try:
                entries.append(Entry(name, entry_name, make_experiment(options)))
            except SuiteError as error:
                raise SuiteError(f"{path.name}, experiment {entry_name!r}: {error}") from error
    twice = {e.name for e in entries if sum(e.name == other.name for other in entries) > 1}
    if twice:
        raise SuiteError(f"{path.name} has several experiments called {', '.join(sorted(twice))}")
    return entries


def _expand(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each experiment that a table stands for."""
    name = table.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise SuiteError(f"{where}: an experiment has a name of lower-case letters, digits, dots, dashes; got {name!r}")
    each = table.get("each", {})
    if not all(isinstance(values, list) and values for values in each.values()):
        raise SuiteError(f"{where}, experiment {name!r}: each option in `each` has a list of values, got {each!r}")
    options = {key: value for key, value in table.items() if key not in ("name", "each")}
    for combination in itertools.product(*each.values()):
        yield (
            "-".join([name, *(str(value).translate(UNNAMED) for value in combination)]),
            {**options, **dict(zip(each, combination, strict=True))},
        )
