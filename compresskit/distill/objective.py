"""An objective: a weighted sum of losses as plain data, and what it becomes for one student and one teacher."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import UNITS, Batch
from compresskit.distill.features import Feature, Features
from compresskit.distill.loss import Comparison, Loss, make_loss
from compresskit.errors import DistillError, OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@final
@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses.

    Args:
        losses: at least one; the same loss may come several times with other options.
    """

    losses: tuple[Loss, ...]

    def __init__(self, *losses: Loss) -> None:
        if not losses:
            raise OptionError("an objective needs at least one loss")
        for loss in losses:
            if not isinstance(loss, Loss):
                raise OptionError(f"an objective is made of losses, got {loss!r}")
        object.__setattr__(self, "losses", losses)

    def names(self) -> tuple[str, ...]:
        """A name for each term: that of the loss, numbered from the second time on."""
        seen: Counter[str] = Counter()
        names = []
        for loss in self.losses:
            seen[loss.name] += 1
            names.append(loss.name if seen[loss.name] == 1 else f"{loss.name}-{seen[loss.name]}")
        return tuple(names)

    def to_data(self) -> dict[str, Any]:
        """Plain data: `{"loss": [{"name": ..., option: value, ...}, ...]}` of the options that are no default."""
        return {"loss": [{"name": loss.name, **_changed(loss)} for loss in self.losses]}

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2)

    def to_toml(self) -> str:
        """One `[[loss]]` table per term; numbers, texts and lists of them read the same in JSON and in TOML."""
        tables = [[f"{key} = {json.dumps(value)}" for key, value in table.items()] for table in self.to_data()["loss"]]
        return "\n".join("\n".join(["[[loss]]", *lines, ""]) for lines in tables)


def _changed(loss: Loss) -> dict[str, Any]:
    """Options that differ from their default; a default of None is never spelled out, TOML has no word for it."""
    values = asdict(loss)
    changed = {f.name: values[f.name] for f in fields(loss) if values[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def objective_from_data(data: Mapping[str, Any]) -> Objective:
    """The objective that `to_data` wrote.

    Raises:
        OptionError: not of that form, or a value that an option cannot take.
        UnknownNameError: no such loss or option; names the nearest one.
    """
    tables = data.get("loss") if isinstance(data, Mapping) else None
    if not isinstance(tables, list) or set(data) != {"loss"}:
        raise OptionError(f"an objective is one list called 'loss', got {data!r}")
    losses = []
    for table in tables:
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise OptionError(f"a loss is a table with a name and options, got {table!r}")
        losses.append(make_loss(table["name"], {key: value for key, value in table.items() if key != "name"}))
    return Objective(*losses)


def objective_from_json(text: str) -> Objective:
    """The objective that `to_json` wrote; errors as in `objective_from_data`."""
    try:
        return objective_from_data(json.loads(text))
    except json.JSONDecodeError as error:
        raise OptionError(f"the objective is not JSON: {error}") from error


def objective_from_toml(text: str) -> Objective:
    """The objective that `to_toml` wrote; errors as in `objective_from_data`."""
    try:
        return objective_from_data(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the objective is not TOML: {error}") from error


@final
@dataclass(frozen=True)
class Evaluated:
    """An objective's value on one batch.

    Args:
        total: to call backward on; no dimension.
        terms: weighted and without gradient, one per loss; they add up to the total.
    """

    total: Tensor
    terms: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class BoundObjective:
    """An objective for two given models: which features it needs, and its value once they are there.

    Args:
        terms: (name, weight, comparisons).
    """

    terms: tuple[tuple[str, float, tuple[Comparison, ...]], ...]

    def student_features(self) -> tuple[Feature, ...]:
        return tuple(sorted({f for _, _, comparisons in self.terms for c in comparisons for f in c.student}))

    def teacher_features(self) -> tuple[Feature, ...]:
        return tuple(sorted({f for _, _, comparisons in self.terms for c in comparisons for f in c.teacher}))

    def make_projections(self) -> nn.ModuleDict:
        """One learned linear map for each term that has one, shared by its layers; trained with the student."""
        sizes = {name: c.projection for name, _, comparisons in self.terms for c in comparisons if c.projection}
        return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def __call__(
        self, student: Features, teacher: Features, batch: Batch, totals: Tensor, projections: nn.ModuleDict
    ) -> Evaluated:
        """Weighted sum of the terms.

        Args:
            student, teacher: features of this batch.
            totals: (4,) units that each sum is divided by, in the order of `UNITS`: those of the whole optimiser step.
            projections: what `make_projections` made.
        """
        values: dict[str, Tensor] = {}
        for name, weight, comparisons in self.terms:
            sums = [
                c.compare(_project(name, c, student, projections), tuple(teacher[f] for f in c.teacher), batch)
                / totals[UNITS.index(c.unit)].clamp(min=1)
                for c in comparisons
            ]
            values[name] = weight * torch.stack(sums).sum().float()
        total = torch.stack(list(values.values())).sum()
        return Evaluated(total, {name: value.detach() for name, value in values.items()})


def _project(name: str, comparison: Comparison, student: Features, projections: nn.ModuleDict) -> tuple[Tensor, ...]:
    tensors = tuple(student[f] for f in comparison.student)
    if comparison.projection is None:
        return tensors
    return tuple(projections[name](tensor.float()) for tensor in tensors)


def bind(objective: Objective, student: Anatomy, teacher: Anatomy) -> BoundObjective:
    """The objective for these two models.

    Raises:
        DistillError: they cannot be compared as it asks; says what would do.
    """
    shared = {id(p) for p in student.model.parameters()} & {id(p) for p in teacher.model.parameters()}
    if shared:
        raise DistillError(
            f"teacher and student share {len(shared)} parameters, so training would change the teacher; "
            "copy.deepcopy the model before compressing it"
        )
    named: Sequence[tuple[str, Loss]] = list(zip(objective.names(), objective.losses, strict=True))
    bound = tuple((name, loss.weight, loss.comparisons(student, teacher)) for name, loss in named)
    if any(comparison.teacher for _, _, comparisons in bound for comparison in comparisons):
        _check_words(student, teacher)
    return BoundObjective(bound)


def _check_words(student: Anatomy, teacher: Anatomy) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise DistillError(
            f"the student knows {student.vocab_size} words and the teacher {teacher.vocab_size}: both read the same "
            "input_ids, so they need the same tokenizer"
        )
