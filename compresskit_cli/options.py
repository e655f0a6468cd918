"""Options that `compress` and `plan` share, and what they mean for the Python API."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class Count(click.ParamType):  # type: ignore[type-arg]
    """A number of parameters or multiply-adds: `5700000`, `5.7M`, `350k`, `1.2B`."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().replace("_", "").replace(",", "")
        scale = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}.get(text[-1:].lower())
        try:
            count = float(text[:-1]) * scale if scale else float(text)
            if not 1 <= count < float("inf"):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r} is not a count of at least 1; write 5700000, 5.7M, 350k or 1.2B", param, ctx)
        return round(count)


@dataclass(frozen=True)
class Choice:
    """What the shared options say, in the terms of `compresskit.compress`."""

    method: str | None
    settings: tuple[str, ...]
    rules: tuple[str, ...]
    ratio: float | None
    params: int | None
    keep: float | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_macs: int | None
    speed: float | None
    machine: str | None
    tokens: int | None
    uniform: bool
    allow_slower: bool

    def given(self) -> dict[str, Any]:
        """What was said at all, for the record."""
        said = {key: value for key, value in vars(self).items() if value not in (None, (), False)}
        return said | ({} if self.machine is None else {"machine": Path(self.machine).name})

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `compresskit.compress` and `compresskit.plan`."""
        from compresskit import decomposition

        if self.method is None and not self.rules:
            raise click.UsageError(
                "say what to do: --method METHOD (see `compresskit methods`) or --rule PATTERN=METHOD"
            )
        if self.method is None and (self.settings or self.include):
            raise click.UsageError("--set and --include belong to --method, which is missing")
        if sum(value is not None for value in (self.ratio, self.params, self.keep)) > 1:
            raise click.UsageError("--ratio, --params and --keep say the same thing: give one of them")
        options = dict(_pair(setting, "--set") for setting in self.settings)
        return {
            "method": None if self.method is None else decomposition(self.method, options),
            "rules": [_rule(rule) for rule in self.rules],
            "ratio": self.ratio,
            "params": self.params,
            "keep": self.keep,
            "include": list(self.include) or "*",
            "exclude": list(self.exclude),
            "max_macs": self.max_macs,
            "speed": self.speed,
            **({} if self.machine is None else {"machine": self.machine}),
            **({} if self.tokens is None else {"tokens": self.tokens}),
            "uniform": self.uniform,
            "allow_slower": self.allow_slower,
        }


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise click.UsageError(f"{option} takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _rule(text: str) -> tuple[str, Any]:
    """`PATTERN=METHOD` or `PATTERN=METHOD:key=value,key=value`; the pattern may hold `=` (`re:.*(?=x)`) itself."""
    from compresskit import decomposition

    parts = re.fullmatch(r"(.+?)=([\w-]+)(?::(.*))?", text)
    if parts is None:
        raise click.UsageError(f"--rule takes PATTERN=METHOD or PATTERN=METHOD:KEY=VALUE,..., got {text!r}")
    pattern, method, settings = parts.groups(default="")
    return pattern, decomposition(method, dict(_pair(item, "--rule") for item in settings.split(",") if item))


def choice_options(function: F) -> F:
    """Adds the options that decide what becomes of a model."""
    options = [
        click.option("--method", "-m", metavar="METHOD", help="Decomposition: see `compresskit methods`."),
        click.option("--ratio", type=float, help="Original / compressed parameters of the whole model, e.g. 19."),
        click.option("--params", type=Count(), help="Parameters that are left, e.g. 5.7M."),
        click.option("--keep", type=float, help="Share of the parameters that is left, e.g. 0.05."),
        click.option(
            "--include", multiple=True, metavar="PATTERN", help="Layers for --method. Glob or re:..., repeatable."
        ),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Layers that stay dense. Repeatable."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Option of the method, e.g. terms=2. Repeatable.",
        ),
        click.option(
            "--rule",
            "rules",
            multiple=True,
            metavar="PATTERN=METHOD[:KEY=VALUE,...]",
            help="Another method for some layers; rules come before --method, the first match wins.",
        ),
        click.option(
            "--max-macs", type=Count(), help="Multiply-adds per token that replaced layers may take, e.g. 10M."
        ),
        click.option("--speed", type=float, help="Expected speed-up of the chosen layers together, at least, e.g. 3."),
        click.option(
            "--machine",
            metavar="NAME|FILE",
            help="Where it is to be fast: see `compresskit machines`. [default: cpu; in bfloat16 cpu-bf16]",
        ),
        click.option("--tokens", type=click.IntRange(1), help="Tokens at a time that it will see. [default: 128]"),
        click.option("--uniform", is_flag=True, help="Layers of one shape get one structure, as in the papers."),
        click.option("--allow-slower", is_flag=True, help="Permit structures expected to be slower than dense."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def model_options(function: F) -> F:
    """Adds the argument MODEL and the options that say how it is loaded."""
    options = [
        click.argument("model"),
        click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Load weights as; auto: as they are."),
        click.option("--device", default="cpu", help="Fit on this device, e.g. cuda."),
        click.option("--revision", help="Branch, tag or commit of a hub model."),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of every random choice."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def read_plan(path: Path) -> Any:
    """The JSON of a plan file.

    Raises:
        PlanError: it cannot be read, or is not JSON.
    """
    from compresskit.errors import PlanError

    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"the plan {str(path)!r} cannot be read as JSON: {error}") from error
