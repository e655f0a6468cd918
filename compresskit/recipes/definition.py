"""What a preset says: what becomes of the weights, and how the student is trained. Plain data, checked when read.

A preset is a TOML file, because it is to be printed, edited and passed back: comments stay beside the values, and
reading one runs no code. It names decompositions and losses by their names, with their options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, final

from compresskit.core.cost import TOKENS, Target
from compresskit.distill import Objective, objective_from_data
from compresskit.errors import CompresskitError, OptionError, UnknownNameError
from compresskit.machines import DEFAULT
from compresskit.machines import machine as find_machine
from compresskit.options import option_text, parse_options
from compresskit.registration import suggestion
from compresskit.tables import merged, set_value, table_text, value_of
from compresskit.tasks import TrainSettings

Table = Mapping[str, Any]


@final
@dataclass(frozen=True, kw_only=True)
class ShapeRule:
    """Layers whose structure is given, not chosen by size.

    Args:
        pattern: glob or `re:...` over names of layers; of several rules the first match wins.
        method: name of a decomposition.
        options: of the decomposition, as text.
        optional: it may match nothing.
    """

    pattern: str
    method: str
    options: Mapping[str, str]
    optional: bool = False


BUDGETS = ("outputs", "weights")


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """The fields of `Compressed` that are numbers and texts."""

    method: str | None = None
    uniform: bool = False
    ratio: float | None = None
    rank_hidden_size: int | None = None
    allow_slower: bool = False
    calibration: int = 0
    even_words: bool = False
    budget: str = BUDGETS[0]
    machine: str | None = None
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if self.calibration < 0:
            raise OptionError(f"calibration is {self.calibration} texts; 0 or more are expected")
        Target(find_machine(self.machine or DEFAULT), self.tokens)  # both are checked there
        if self.budget not in BUDGETS:
            raise OptionError(f"budget is {self.budget!r}; {' or '.join(BUDGETS)} is expected")


@final
@dataclass(frozen=True, kw_only=True)
class Compressed(_Plain):
    """A student that is the teacher with factorised layers.

    Args:
        rules: structures that need no size; used unless a ratio is asked for.
        method, options, uniform: of `compresskit.compress`, for a student of a given ratio.
        methods: with a ratio: pattern and method of layers that get another one.
        exclude: patterns of layers that stay dense.
        ratio: asked for unless the caller does.
        rank_hidden_size: ranks in `rules` are for a model of this hidden size; others scale in proportion.
        allow_slower: with a ratio: permit structures that are expected to run slower than dense; rules always do.
        calibration: fit for what the layers see on so many texts of the corpus, or without one of the task's training
            data; 0: for the weights alone.
        budget: with a ratio and a calibration: choose structures by the errors of the layers' `outputs`, for the best
            start, or by those of the `weights`, which ends better where training follows at a high ratio.
        even_words: in that all words count alike, not as often as the texts have them.
        machine, tokens: with a ratio: where the student is to be fast, as for `compresskit.compress`.
    """

    rules: tuple[ShapeRule, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A dense student with fewer and narrower layers.

    Args:
        layer_step: layers of the teacher for one of the student.
        ratio: asked for unless the caller does; the hidden size follows from it.
    """

    layer_step: int = 1
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.layer_step < 1:
            raise OptionError(f"layer_step is {self.layer_step}; at least 1 is expected")


@final
@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """How one stage trains.

    Args:
        settings: of the training.
        objective: the losses, without those of `mlm`, `clm` and `nsp`.
        max_length: tokens of an input at most; None: the task's. A tokenizer's limit may be lower.
        mlm, clm, nsp: plain text only: also masked words, next words and next sentence, where teacher and student have
            such heads.
        altered_copies: a task only: copies of each example in which words are replaced, for the teacher to answer. An
            epoch takes so many times longer.
        altered_share: of the tokens of such a copy.
        tasks: settings that differ for some tasks, by name.
    """

    settings: TrainSettings
    objective: Objective
    max_length: int | None = None
    mlm: bool = False
    clm: bool = False
    nsp: bool = False
    altered_copies: int = 0
    altered_share: float = 0.4
    tasks: Mapping[str, Table] = field(default_factory=dict)

    def for_task(self, name: str) -> "StageRecipe":
        """The stage with what differs for this task."""
        own = self.tasks.get(name, {})
        ours = {key: value for key, value in own.items() if key in _names(_Stage)}
        settings = {key: value for key, value in own.items() if key not in ours}
        return replace(self, settings=replace(self.settings, **settings), tasks={}, **ours)


@final
@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe: a student and the stages of its training.

    Args:
        name, summary, source: for people; the source says what is the paper's and what is ours.
        variant: the chosen one, None if there are none.
        student: how it is made.
        corpus: the stage on plain text, None without one.
        task: the stage on a task, None without one.
        data: the tables that all this was read from, those of the variant merged in.
    """

    name: str
    summary: str
    source: str
    variant: str | None
    student: Compressed | Smaller
    corpus: StageRecipe | None
    task: StageRecipe | None
    data: Table = field(repr=False, compare=False)

    @property
    def title(self) -> str:
        """`kroneckerbert:k21`."""
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    def with_values(self, values: Mapping[str, Any]) -> "Preset":
        """The preset with other values, by dotted name: `{"task.lr": 1e-4, "corpus.max_steps": 300}`.

        A value of the task stage is then that of every task.

        Raises:
            UnknownNameError: no such name.
            OptionError: a value that it cannot have.
        """
        data = self.data
        for name, value in values.items():
            part = name.partition(".")[0]
            if part in _PARTS and part not in data:
                raise UnknownNameError(f"preset {self.title} has no table {part!r}, so there is no {name!r}")
            data = set_value(data, name, value)
        return preset_from_data(data, f"preset {self.title}")

    def with_texts(self, values: Mapping[str, str]) -> "Preset":
        """`with_values` with values as TOML writes them; what is none (a name without quotes) is a text.

        Raises:
            UnknownNameError, OptionError: as `with_values`.
        """
        return self.with_values({name: value_of(text) for name, text in values.items()})

    def to_toml(self) -> str:
        """The values in use, without the comments of the file."""
        return table_text(self.data)


def preset_from_data(data: Table, where: str) -> Preset:
    """The preset that tables say.

    Args:
        where: for messages, such as the name of the file.

    Raises:
        UnknownNameError: a key, variant, decomposition option or loss that does not exist; names the nearest.
        OptionError: a value that does not fit, or something is missing.
    """
    top = _known(data, ("name", "summary", "source", "variant", "variants", *_PARTS), where)
    texts = {key: top.get(key, "") for key in ("name", "summary", "source")}
    if not all(isinstance(text, str) for text in texts.values()) or not texts["name"]:
        raise OptionError(f"{where}: name, summary and source are texts, and there has to be a name")
    variant = _variant(top, where)
    chosen = dict(top) if variant is None else merged(top, top["variants"][variant])
    for name in top.get("variants", {}):  # a mistake in a variant that is not used would only show later
        _known(top["variants"][name], _PARTS, f"{where}: variants.{name}")
    made = [key for key in ("compress", "smaller") if key in chosen]
    if len(made) != 1:
        raise OptionError(f"{where}: a preset has one table [compress] or [smaller], this one has {len(made)}")
    stages = {key: _stage(chosen[key], f"{where}: {key}", key) for key in ("corpus", "task") if key in chosen}
    if not stages:
        raise OptionError(f"{where}: a preset has a table [corpus], [task] or both, this one has none")
    make = _compressed if made == ["compress"] else _smaller
    return Preset(
        **texts,
        variant=variant,
        student=make(chosen[made[0]], f"{where}: {made[0]}"),
        corpus=stages.get("corpus"),
        task=stages.get("task"),
        data=chosen if variant is None else {**chosen, "variants": {variant: {}}},
    )


_PARTS = ("compress", "smaller", "corpus", "task")


def _known(table: Any, keys: Sequence[str], where: str) -> Table:
    if not isinstance(table, Mapping):
        raise OptionError(f"{where} is a table, not {table!r}")
    for key in table:
        if key not in keys:
            raise UnknownNameError(f"{where} has no key {key!r}{suggestion(key, keys)}")
    return table


def _variant(top: Table, where: str) -> str | None:
    variants, chosen = top.get("variants", {}), top.get("variant")
    if not isinstance(variants, Mapping):
        raise OptionError(f"{where}: variants is a table of tables, not {variants!r}")
    if not variants and chosen is None:
        return None
    if chosen not in variants:
        raise UnknownNameError(f"{where} has no variant {chosen!r}{suggestion(str(chosen), variants)}")
    return str(chosen)


def _compressed(table: Any, where: str) -> Compressed:
    table = _known(table, _names(Compressed), where)
    rules = table.get("rules", [])
    if not isinstance(rules, list):
        raise OptionError(f"{where}: rules is a list of tables, not {rules!r}")
    exclude = table.get("exclude", [])
    if not (isinstance(exclude, list) and all(isinstance(pattern, str) for pattern in exclude)):
        raise OptionError(f"{where}: exclude is a list of texts, not {exclude!r}")
    made = Compressed(
        rules=tuple(_rule(rule, f"{where}.rules") for rule in rules),
        options=_options(table.get("options", {}), f"{where}.options"),
        methods=_options(table.get("methods", {}), f"{where}.methods"),
        exclude=tuple(exclude),
        **_checked(_Plain, table, where),
    )
    for pattern, name in made.methods.items():
        if not (pattern and name):
            raise OptionError(f"{where}.methods: a pattern and a method are texts, got {pattern!r} = {name!r}")
    if not made.rules and made.method is None:
        raise OptionError(f"{where} has neither rules nor a method")
    return made


def _rule(rule: Any, where: str) -> ShapeRule:
    if not isinstance(rule, Mapping) or not all(isinstance(rule.get(k), str) for k in ("pattern", "method")):
        raise OptionError(f"{where}: a rule is a table with a pattern and a method, got {rule!r}")
    own = {key: value for key, value in rule.items() if key not in ("pattern", "method", "optional")}
    optional = rule.get("optional", False)
    if not isinstance(optional, bool):
        raise OptionError(f"{where}: optional is true or false, got {optional!r}")
    return ShapeRule(pattern=rule["pattern"], method=rule["method"], options=_options(own, where), optional=optional)


def _options(table: Any, where: str) -> dict[str, str]:
    if not isinstance(table, Mapping):
        raise OptionError(f"{where} is a table, not {table!r}")
    return {key: option_text(tuple(value) if isinstance(value, list) else value) for key, value in table.items()}


def _smaller(table: Any, where: str) -> Smaller:
    return Smaller(**_checked(Smaller, _known(table, _names(Smaller), where), where))


def _stage(table: Any, where: str, kind: str) -> StageRecipe:
    own = ("mlm", "clm", "nsp") if kind == "corpus" else ("tasks", *_TASK_ALONE)
    table = _known(table, [*_names(TrainSettings), "max_length", "loss", *own], where)
    tasks = table.get("tasks", {})
    if not isinstance(tasks, Mapping):
        raise OptionError(f"{where}.tasks is a table of tables, not {tasks!r}")
    try:
        objective = objective_from_data({"loss": table.get("loss")})
    except CompresskitError as error:
        raise type(error)(f"{where}: {error}") from error
    return StageRecipe(
        settings=TrainSettings(**_checked(TrainSettings, table, where)),
        objective=objective,
        tasks={name: _for_one_task(tasks[name], f"{where}.tasks.{name}") for name in tasks},
        **_checked(_Stage, table, where),
    )


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """The fields of `StageRecipe` that are numbers."""

    max_length: int | None = None
    mlm: bool = False
    clm: bool = False
    nsp: bool = False
    altered_copies: int = 0
    altered_share: float = 0.4

    def __post_init__(self) -> None:
        if self.altered_copies < 0:
            raise OptionError(f"altered_copies is {self.altered_copies}; 0 or more are expected")
        if not 0 < self.altered_share <= 1:
            raise OptionError(f"altered_share is {self.altered_share}; a share above 0, at most 1, is expected")


_TASK_ALONE = ("altered_copies", "altered_share")


def _for_one_task(table: Any, where: str) -> dict[str, Any]:
    table = _known(table, [*_names(TrainSettings), "max_length", *_TASK_ALONE], where)
    return {**_checked(TrainSettings, table, where), **_checked(_Stage, table, where)}


def _names(cls: Any) -> list[str]:
    return [f.name for f in fields(cls)]


def _checked(cls: Any, table: Table, where: str) -> dict[str, Any]:
    """The values of a table that are fields of a dataclass, each checked against its type."""
    own = {key: value for key, value in table.items() if key in _names(cls)}
    try:
        made = parse_options(cls, {key: option_text(value) for key, value in own.items()})
    except CompresskitError as error:
        raise type(error)(f"{where}: {error}") from error
    return {key: getattr(made, key) for key in own}
