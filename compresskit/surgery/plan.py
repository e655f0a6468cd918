"""Plan: which structure for which site, as data. Made by pricing and a budget, or read from an edited file."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

from torch import nn

from compresskit.core.cost import Target, dense_lookup_operations, dense_operations
from compresskit.core.decomposition import Decomposition
from compresskit.core.registry import decomposition, structure_from_json
from compresskit.core.structure import Structure
from compresskit.errors import CheckpointError, OptionError, PlanError, UnknownNameError
from compresskit.machines import machine, machine_from_data, machine_to_data
from compresskit.options import option_text
from compresskit.surgery.sites import Refusal, Site, Survey, find_sites

FORMAT_VERSION = 1


@final
@dataclass(frozen=True)
class PlannedSite:
    """What becomes of one site.

    Args:
        site: where.
        decomposition: how it is fitted, with options.
        structure: its new sizes.
        target: what times are expected for.
        expected_error: relative error that pricing promised, None if it was not priced (an edited plan).
        alternatives: why this method: the least relative error of each that there was to choose from, with at most as
            many parameters, the best first; empty where there was one method only.
    """

    site: Site
    decomposition: Decomposition
    structure: Structure
    target: Target
    expected_error: float | None
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def params(self) -> int:
        return self.structure.num_params + self.site.extra_params

    @property
    def macs(self) -> int:
        return site_macs(self.site, self.structure)

    @property
    def dense_macs(self) -> int:
        return self.site.multiplied * self.site.num_params

    @property
    def time_ns(self) -> int:
        """Expected time for the target."""
        return site_time_ns(self.site, self.structure, self.target)

    @property
    def dense_time_ns(self) -> int:
        return site_time_ns(self.site, None, self.target)

    @property
    def speedup(self) -> float:
        """Expected time while dense / expected time."""
        return self.dense_time_ns / self.time_ns

    @property
    def slower(self) -> bool:
        """Whether it does more multiply-adds than the dense layer or is expected to take notably longer."""
        return runs_slower(self.site, self.structure, self.target)


@final
@dataclass(frozen=True)
class FrontPoint:
    """One size, and the least loss that was found for it.

    Args:
        params: of the whole model.
        ratio: original / compressed parameters.
        macs: multiply-adds per token of the layers that rules chose.
        time_ns: expected time of these layers for the target of the plan.
        error: root mean square of the layers' relative errors, weighted as in the loss; dense layers have none.
        gap: proven distance of the loss from the least possible one, as a share.
    """

    params: int
    ratio: float
    macs: int
    time_ns: int
    error: float
    gap: float


@final
@dataclass(frozen=True)
class Plan:
    """Which structure for which site; all else stays dense, with the reason.

    Args:
        sites: what is replaced, in the model's order.
        left: weight matrices that stay dense, and why.
        num_params: parameters of the dense model.
        coverage: share of them that is in replaceable layers, whether the rules chose them or not.
        gap: proven distance of the budget's loss from the least that the priced structures reach, as a share; None for
            a plan that was read.
        front: what other sizes would lose, the smallest first; empty where there was nothing to choose.
        compared: relative errors of what whole models answered on samples, by name: `together` where each site has the
            best of several methods, and with one of them alone; that of the plan itself first. Empty if nothing was
            compared.
        searched: by shape how many times as much its errors count as without a search; of those that count otherwise.
    """

    sites: tuple[PlannedSite, ...]
    left: tuple[Refusal, ...]
    num_params: int
    coverage: float
    gap: float | None = None
    front: tuple[FrontPoint, ...] = ()
    compared: tuple[tuple[str, float], ...] = ()
    searched: tuple[tuple[str, float], ...] = ()

    @property
    def target(self) -> Target:
        """How many tokens on which machine times are expected for."""
        return self.sites[0].target

    @property
    def params_after(self) -> int:
        return self.num_params - sum(planned.site.num_params - planned.params for planned in self.sites)

    @property
    def ratio(self) -> float:
        """Original / compressed parameters of the whole model."""
        return self.num_params / self.params_after

    @property
    def macs(self) -> int:
        """Multiply-adds per token in the sites of the plan."""
        return sum(planned.macs for planned in self.sites)

    @property
    def dense_macs(self) -> int:
        """Multiply-adds per token in the same sites while they are dense."""
        return sum(planned.dense_macs for planned in self.sites)

    @property
    def speedup(self) -> float:
        """Expected time of the sites of the plan while dense / as planned."""
        return sum(p.dense_time_ns for p in self.sites) / max(sum(p.time_ns for p in self.sites), 1)

    def by_group(self) -> dict[str, list[PlannedSite]]:
        """Sites by name with layer numbers replaced by `*`."""
        groups: dict[str, list[PlannedSite]] = {}
        for planned in self.sites:
            groups.setdefault(group_name(planned.site.name), []).append(planned)
        return groups

    def to_json(self) -> dict[str, Any]:
        """Plain data; `plan_from_json` reads `sites` back, the other entries are for the reader."""
        return {
            "format_version": FORMAT_VERSION,
            "num_params": self.num_params,
            "params_after": self.params_after,
            "ratio": self.ratio,
            "expected_speedup": self.speedup,
            "target": {"tokens": self.target.tokens, "machine": machine_to_data(self.target.machine)},
            "coverage": self.coverage,
            "gap": self.gap,
            "front": [dataclasses.asdict(point) for point in self.front],
            "compared": dict(self.compared),
            "searched": dict(self.searched),
            "sites": [_site_json(planned) for planned in self.sites],
            "left_dense": [dataclasses.asdict(refusal) for refusal in self.left],
        }


def site_macs(site: Site, structure: Structure) -> int:
    """Multiply-adds per token of all modules of a site."""
    lookups = len(site.kinds) - site.multiplied
    return site.multiplied * structure.macs + lookups * structure.lookup_macs


def site_time_ns(site: Site, structure: Structure | None, target: Target) -> int:
    """Expected time of all modules of a site, dense without a structure. In whole ns."""
    return _time_ns(site.rows, site.cols, structure, site.multiplied, len(site.kinds) - site.multiplied, target)


@lru_cache(maxsize=1 << 16)
def _time_ns(rows: int, cols: int, structure: Structure | None, multiplied: int, lookups: int, target: Target) -> int:
    tokens, seconds = target.tokens, 0.0
    speeds = target.machine.speeds(None if structure is None else structure.kind)
    if structure is None:
        seconds += multiplied and multiplied * speeds.time_s(dense_operations(rows, cols, tokens))
        seconds += lookups and lookups * speeds.time_s(dense_lookup_operations(cols, tokens))
    else:
        seconds += multiplied and multiplied * speeds.time_s(structure.operations(tokens))
        seconds += lookups and lookups * speeds.time_s(structure.lookup_operations(tokens))
    return max(round(seconds * 1e9), 1)


def runs_slower(site: Site, structure: Structure, target: Target) -> bool:
    """Whether a structure does more multiply-adds than the dense layer or is expected to take notably longer.

    Less than the machine's `notable_s` does not count, nor do layers that take no more than its `tiny_s` while dense:
    what tiny layers take is the overhead of calls. Nor does a table that rows are only looked up in: that takes next to
    nothing.
    """
    if site.multiplied == 0:
        return False
    ours_s, dense_s = (site_time_ns(site, s, target) / (1e9 * site.multiplied) for s in (structure, None))
    return structure.macs > site.num_params or target.machine.is_slower(ours_s, dense_s)


def _site_json(planned: PlannedSite) -> dict[str, Any]:
    return {
        "name": planned.site.name,
        "method": planned.decomposition.name,
        "options": {f.name: option_text(getattr(planned.decomposition, f.name)) for f in _options(planned)},
        "structure": planned.structure.to_json(),
        "params": planned.params,
        "dense_params": planned.site.num_params,
        "macs": planned.macs,
        "dense_macs": planned.dense_macs,
        "expected_speedup": planned.speedup,
        "expected_error": planned.expected_error,
        **({"alternatives": dict(planned.alternatives)} if planned.alternatives else {}),
    }


def _options(planned: PlannedSite) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(planned.decomposition)


def plan_from_json(data: Any, model: nn.Module) -> Plan:
    """The plan that `to_json` wrote, perhaps edited, checked against a model.

    Only `target` and `name`, `method`, `options` and `structure` of each site count; all numbers are computed anew.

    Raises:
        PlanError: another format version, a site that the model lacks or refuses, sizes that do not fit.
        UnknownNameError: an unknown method or option.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("sites"), list) or not data["sites"]:
        raise PlanError("a plan is a JSON object with a list 'sites' that is not empty")
    if data.get("format_version") != FORMAT_VERSION:
        raise PlanError(
            f"this plan has format version {data.get('format_version')!r}, this release reads {FORMAT_VERSION}"
        )
    survey, target = find_sites(model), _target_from_json(data.get("target"))
    planned = [_planned_from_json(entry, survey, target) for entry in data["sites"]]
    names = [p.site.name for p in planned]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"the plan names these sites twice: {', '.join(twice)}")
    rest = [Refusal(s.name, s.num_params, "not in the plan") for s in survey.sites if s.name not in names]
    return Plan(tuple(planned), (*survey.refusals, *rest), survey.num_params, survey.coverage)


def _target_from_json(data: Any) -> Target:
    """That of a plan; plans of before had the default."""
    if data is None:
        return Target(machine())
    if not isinstance(data, Mapping) or not isinstance(tokens := data.get("tokens"), int):
        raise PlanError(f"'target' of a plan is an object with 'machine' and a number of 'tokens', got {data!r}")
    try:
        return Target(machine_from_data(data.get("machine"), "'target.machine' of the plan"), tokens)
    except (OptionError, UnknownNameError) as error:
        raise PlanError(str(error)) from error


def _planned_from_json(entry: Any, survey: Survey, target: Target) -> PlannedSite:
    needed = {"name": str, "method": str, "structure": Mapping}
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(k), t) for k, t in needed.items()):
        raise PlanError(f"each site of a plan has 'name', 'method' and 'structure'; got {entry!r}")
    name, options = entry["name"], entry.get("options", {})
    if not isinstance(options, Mapping) or not all(isinstance(value, str) for value in options.values()):
        raise PlanError(f"'options' of {name!r} are texts, as after --set; got {options!r}")
    site = next((site for site in survey.sites if name in site.names), None)
    if site is None:
        refused = next((r.reason for r in survey.refusals if r.name == name), None)
        known = ", ".join(s.name for s in survey.sites[:: max(1, len(survey.sites) // 6)])
        raise PlanError(
            f"the plan names {name!r}, "
            + (f"which is left alone: {refused}" if refused else f"which this model does not have; it has {known}, ...")
        )
    chosen = decomposition(entry["method"], options)
    try:
        structure = structure_from_json(entry["structure"])
    except CheckpointError as error:
        raise PlanError(f"site {name!r}: {error}") from error
    if (structure.rows, structure.cols) != (site.rows, site.cols):
        raise PlanError(
            f"{name!r} is {site.rows} x {site.cols}; the plan's structure is for another weight: {structure}"
        )
    if not isinstance(structure, chosen.structures):
        raise PlanError(f"site {name!r}: {chosen.name} does not fit structures of kind {structure.kind!r}")
    expected = entry.get("expected_error")
    if not isinstance(expected, float) or not math.isfinite(expected):
        expected = None
    others = entry.get("alternatives", {})
    sound = isinstance(others, Mapping) and all(isinstance(n, str) and isinstance(e, float) for n, e in others.items())
    return PlannedSite(site, chosen, structure, target, expected, tuple(others.items()) if sound else ())


def group_name(name: str) -> str:
    """`encoder.layer.3.attention.self.query` -> `encoder.layer.*.attention.self.query`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
