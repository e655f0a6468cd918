"""Kinds of experiment: one file here is one kind, found by a package walk."""

import dataclasses
import difflib
import hashlib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final, get_origin, get_type_hints


class SuiteError(ValueError):
    """A suite, a kind or an option does not exist or cannot be what it is; the user can mend it."""


class ExperimentSkipped(Exception):  # noqa: N818 - nothing went wrong
    """The experiment cannot run here; the text says why and what would make it run."""


@final
@dataclass(frozen=True)
class Outcome:
    """What an experiment measured.

    Args:
        figures: plain data for JSON, units in the names.
        skipped: parts that were left out, each with the reason.
    """

    figures: Mapping[str, Any]
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """One experiment: a frozen dataclass whose fields are the options that a suite may give.

    Args:
        seed: of random weights and inputs.
        threads: that torch and its libraries may use, here and in every process that is started from here.
    """

    kind: ClassVar[str]
    later: ClassVar[tuple[str, ...]] = ()
    """Options that came when there were results: left out where they are the default, so that those stay current."""

    seed: int = 0
    threads: int = 2

    @abstractmethod
    def run(self, data: Path | None) -> Outcome:
        """Measure; called once, in a fresh process.

        Args:
            data: folder with evaluation data that is not part of the project, or None.

        Raises:
            ExperimentSkipped: it cannot run here.
        """

    def run_in(self, data: Path | None, work: Path) -> Outcome:
        """`run` for kinds that take long: they keep in `work` what the next try goes on from. By default just `run`.

        Args:
            work: folder that several experiments share; it may not exist yet.
        """
        return self.run(data)

    def key(self) -> str:
        """Digest of the configuration: a name for a folder in which only this experiment goes on."""
        said = json.dumps(self.configuration(), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @classmethod
    @abstractmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        """One row of the report, column title -> cell, from a result of this kind."""

    def configuration(self) -> dict[str, Any]:
        """Everything that decides what is measured, as it reads back from JSON."""
        plain = {
            f.name for f in dataclasses.fields(self) if f.name in self.later and getattr(self, f.name) == f.default
        }
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in plain}
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def kinds() -> dict[str, type[Experiment]]:
    """Every kind by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {cls.kind: cls for cls in sorted(Experiment.__subclasses__(), key=lambda cls: cls.kind)}


def make_experiment(options: Mapping[str, Any]) -> Experiment:
    """The experiment that a configuration (`kind` and options) describes.

    Raises:
        SuiteError: unknown kind or option, a missing option, or a value of the wrong type.
    """
    known = kinds()
    cls = known[nearest(options.get("kind"), known, "kind of experiment")]
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {key: value for key, value in options.items() if key != "kind"}
    for key, value in given.items():
        nearest(key, fields, f"option of {cls.kind}")
        _check_type(value, hints[key], f"{cls.kind}: {key}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in given]
    if missing:
        raise SuiteError(f"an experiment of kind {cls.kind!r} needs {', '.join(missing)}")
    frozen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return cls(**frozen)


def nearest(name: object, known: Iterable[str], what: str) -> str:
    """The name itself if it is known; else a SuiteError that suggests the nearest."""
    names = sorted(known)
    if isinstance(name, str) and name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise SuiteError(f"there is no {what} {name!r}{hint} Known: {', '.join(names) or 'none'}")


def _check_type(value: object, hint: Any, what: str) -> None:
    accepted = {float: (int, float), int: (int,), str: (str,)}.get(hint, (list, tuple))
    if not isinstance(value, accepted) or isinstance(value, bool):
        wanted = "a list" if get_origin(hint) is tuple else {float: "a number", int: "an integer", str: "a text"}[hint]
        raise SuiteError(f"{what} is {wanted}, got {value!r}")
