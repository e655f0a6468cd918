"""From rules and a budget to a plan: analyse every site once, price its menu, let the budget choose."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from compresskit.core.decomposition import Analysis, Decomposition, as_matrix, squared_norm
from compresskit.core.structure import Structure
from compresskit.errors import BudgetError
from compresskit.surgery.budget import Choice, solve
from compresskit.surgery.plan import Plan, PlannedSite, site_macs
from compresskit.surgery.rules import Assignment
from compresskit.surgery.sites import Refusal, Site, site_weight

SMALLER, LARGER = 4, 8
"""Structures between the average size over SMALLER and times LARGER are priced; more only if these do not reach."""
MAX_CHOICES = 6000
"""Choices that the solver gets in all; menus that are finer (one rank after the other) are thinned."""


@final
@dataclass(frozen=True)
class Progress:
    """One step of long work, for whoever shows it.

    Args:
        stage: `analyse` or `fit`.
        name: the site just finished.
        done, total: sites finished, and sites in this stage.
        error: relative error of the fitted site; None while analysing.
    """

    stage: str
    name: str
    done: int
    total: int
    error: float | None = None


OnProgress = Callable[[Progress], None]


@final
@dataclass(frozen=True)
class Planned:
    """A plan, and the analyses that fitting can go on from (by site name; those worth their memory)."""

    plan: Plan
    analyses: Mapping[str, Analysis]


@final
@dataclass(frozen=True)
class _Priced:
    """A site with what it may become; `structures[0]` is None: it may stay dense."""

    site: Site
    decomposition: Decomposition
    structures: tuple[Structure | None, ...]
    errors: tuple[float, ...]
    analysis: Analysis | None

    def choices(self) -> list[Choice]:
        site = self.site
        return [
            Choice(site.num_params, site.multiplied * site.num_params, 0.0)
            if structure is None
            else Choice(structure.num_params + site.extra_params, site_macs(site, structure), error * site.num_params)
            for structure, error in zip(self.structures, self.errors, strict=True)
        ]


def make_plan(
    model: nn.Module,
    assignment: Assignment,
    *,
    num_params: int,
    max_params: int | None,
    max_macs: int | None = None,
    uniform: bool = False,
    allow_slower: bool = False,
    on_progress: OnProgress | None = None,
) -> Planned:
    """The plan that loses least within the budget. Reads the model, changes nothing.

    The loss is the squared relative error of a site times its number of parameters, summed: it does not depend on
    the scale of a layer's weight, which the following normalisation undoes.

    Args:
        assignment: which decomposition for which site, from `rules.assign`.
        num_params: parameters of the model, from the survey.
        max_params: parameters that the whole compressed model may have; None: options leave one structure per site.
        max_macs: multiply-adds per token that the assigned sites may take together; None: no limit.
        uniform: all sites of one shape and method get the same structure, as in the papers.
        allow_slower: also consider structures that take more multiply-adds than the dense layer.

    Raises:
        BudgetError: the rules cannot reach the budget; says what they reach and what holds them back.
        WeightError: a weight holds NaN or infinity, or is no real matrix; names it.
    """
    menus: Mapping[str, Sequence[Structure]] = _menus(assignment, allow_slower=allow_slower)
    if max_params is None:
        _refuse_choice(assignment, menus)
    else:
        rest = num_params - sum(site.num_params for site, _ in assignment.chosen)
        _refuse_unreachable(assignment, menus, rest, num_params, max_params)
        menus = _narrow(assignment, menus, max_params - rest)
    priced: list[_Priced] = []
    for site, decomposition in assignment.chosen:
        priced.append(_price(model, site, decomposition, menus[site.name]))
        if on_progress is not None:
            on_progress(Progress("analyse", site.name, len(priced), len(assignment.chosen)))
    if max_params is None:
        picks, gap = [(p, len(p.structures) - 1) for p in priced], 0.0
        _refuse_macs(picks, max_macs)
    else:
        picks, gap = _solve(priced, max_params=max_params - rest, max_macs=max_macs, uniform=uniform)
    planned, dense = _sort_picks(picks)
    if not planned:
        raise BudgetError("every site would stay dense: the budget is too generous, or the method has no structure")
    plan = Plan(planned, (*assignment.left, *dense), num_params, assignment.coverage, gap)
    return Planned(plan, {p.site.name: p.analysis for p in priced if p.analysis is not None})


def _menus(assignment: Assignment, *, allow_slower: bool) -> dict[str, list[Structure]]:
    """Menu of each site by its name; sites that are alike share one, since a deep model has few shapes."""
    made: dict[object, list[Structure]] = {}
    menus: dict[str, list[Structure]] = {}
    for site, decomposition in assignment.chosen:
        key = (decomposition, site.rows, site.cols, site.kinds, site.extra_params)
        if key not in made:
            made[key] = _menu(site, decomposition, allow_slower=allow_slower)
        menus[site.name] = made[key]
    return menus


def _menu(site: Site, decomposition: Decomposition, *, allow_slower: bool) -> list[Structure]:
    """Structures smaller than the weight; none that takes more multiply-adds than the dense layer unless allowed."""
    return [
        structure
        for structure in decomposition.menu(site.rows, site.cols, lookup=site.lookup)
        if structure.num_params + site.extra_params < site.num_params
        and (allow_slower or site.multiplied == 0 or structure.macs <= site.num_params)
    ]


def _refuse_choice(assignment: Assignment, menus: Mapping[str, Sequence[Structure]]) -> None:
    for site, decomposition in assignment.chosen:
        if len(menus[site.name]) > 1:
            raise BudgetError(
                f"{decomposition.name} has {len(menus[site.name])} structures for {site.name!r}, nothing to choose by: "
                "give ratio, params or keep, or options that fix the structure"
            )


def _refuse_unreachable(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], rest: int, num_params: int, max_params: int
) -> None:
    least = {site.name: _least(site, menus[site.name]) for site, _ in assignment.chosen}
    floor = rest + sum(least.values())
    if floor <= max_params:
        return
    holders = [(r.num_params, r.name, r.reason) for r in assignment.left]
    holders += [
        (n, name, "its smallest structure" if menus[name] else "the method has no structure for its shape")
        for name, n in least.items()
    ]
    biggest = "; ".join(f"{name} {n:,} ({reason})" for n, name, reason in sorted(holders, reverse=True)[:4])
    asked = num_params / max_params if max_params else math.inf
    digits = 10 ** (3 - math.floor(math.log10(num_params / floor)))  # four, rounded down: what it says can be reached
    raise BudgetError(
        f"ratio {asked:.4g} leaves {max_params:,} of {num_params:,} parameters; the highest ratio that these rules "
        f"reach is {math.floor(num_params / floor * digits) / digits:.4g} ({floor:,} parameters, {rest:,} of them in "
        f"what no rule touches). Most is held by: {biggest}"
    )


def _refuse_macs(picks: Sequence[tuple[_Priced, int]], max_macs: int | None) -> None:
    macs = sum(priced.choices()[pick].macs for priced, pick in picks)
    if max_macs is not None and macs > max_macs:
        raise BudgetError(f"these options take {macs:,} multiply-adds per token together, more than {max_macs:,}")


def _narrow(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], budget: int
) -> Mapping[str, Sequence[Structure]]:
    """What to price: structures around the average compression, wider until the smallest ones fit the budget.

    A site that cannot be compressed nearly that much keeps its smallest structure.
    """
    average = sum(site.num_params for site, _ in assignment.chosen) / max(budget, 1)
    smaller = float(SMALLER)

    def narrowed(site: Site) -> Sequence[Structure]:
        menu = menus[site.name]
        near = [s for s in menu if average / LARGER <= site.num_params / s.num_params <= average * smaller]
        return near or sorted(menu, key=lambda s: s.num_params)[:1]

    while True:
        near = {site.name: narrowed(site) for site, _ in assignment.chosen}
        if sum(_least(site, near[site.name]) for site, _ in assignment.chosen) <= budget:
            return near
        smaller *= 4


def _least(site: Site, menu: Sequence[Structure]) -> int:
    """Fewest parameters that a site can have."""
    return min((s.num_params + site.extra_params for s in menu), default=site.num_params)


def _price(model: nn.Module, site: Site, decomposition: Decomposition, menu: Sequence[Structure]) -> _Priced:
    weight = site_weight(model, site)
    matrix = as_matrix(weight, f"the weight of {site.name!r}")
    analysis = decomposition.analyse(matrix)
    energy = squared_norm(matrix)
    squared = analysis.squared_errors(menu)
    errors = [0.0 if energy == 0 else error / energy for error in squared]
    same_memory = matrix.data_ptr() == weight.data_ptr()  # a widened copy of every weight would double the memory
    return _Priced(site, decomposition, (None, *menu), (0.0, *errors), analysis if same_memory else None)


def _solve(
    priced: Sequence[_Priced], *, max_params: int, max_macs: int | None, uniform: bool
) -> tuple[list[tuple[_Priced, int]], float]:
    """The pick for each site, in the order of `priced`, and the proven gap."""
    groups = _group(priced, uniform=uniform)
    limit = max(MAX_CHOICES // len(groups), 32)
    thinned = [_thin(group, limit) for group in groups]
    solution = solve([_sum_choices(group) for group in thinned], max_params=max_params, max_macs=max_macs)
    picks = {p.site.name: (p, pick) for group, pick in zip(thinned, solution.picks, strict=True) for p in group}
    return [picks[p.site.name] for p in priced], solution.gap


def _group(priced: Sequence[_Priced], *, uniform: bool) -> list[list[_Priced]]:
    if not uniform:
        return [[p] for p in priced]
    groups: dict[object, list[_Priced]] = {}
    for p in priced:
        groups.setdefault((p.decomposition, p.structures, p.site.kinds, p.site.extra_params), []).append(p)
    return list(groups.values())


def _sum_choices(group: Sequence[_Priced]) -> list[Choice]:
    """Choices of sites that share one structure: everything adds up."""
    columns = zip(*(p.choices() for p in group), strict=True)
    return [Choice(sum(c.params for c in col), sum(c.macs for c in col), sum(c.loss for c in col)) for col in columns]


def _thin(group: Sequence[_Priced], limit: int) -> list[_Priced]:
    """About `limit` structures: the best of each of `limit` sizes, spaced evenly on a log scale, and the smallest."""
    choices = _sum_choices(group)
    if len(choices) <= limit:
        return list(group)
    low, high = math.log(min(c.params for c in choices)), math.log(max(c.params for c in choices))
    best: dict[int, int] = {}
    for i, choice in enumerate(choices):
        bin_ = int((math.log(choice.params) - low) / (high - low) * limit)
        if bin_ not in best or choice.loss < choices[best[bin_]].loss:
            best[bin_] = i
    smallest = min(range(len(choices)), key=lambda i: (choices[i].params, choices[i].loss))
    kept = sorted({0, smallest, *best.values()})
    return [
        _Priced(
            p.site, p.decomposition, tuple(p.structures[i] for i in kept), tuple(p.errors[i] for i in kept), p.analysis
        )
        for p in group
    ]


def _sort_picks(picks: Sequence[tuple[_Priced, int]]) -> tuple[tuple[PlannedSite, ...], list[Refusal]]:
    planned: list[PlannedSite] = []
    dense: list[Refusal] = []
    for priced, pick in picks:
        structure = priced.structures[pick]
        if structure is None:
            reason = "the budget keeps it dense" if len(priced.structures) > 1 else "the method has no structure for it"
            dense.append(Refusal(priced.site.name, priced.site.num_params, reason))
        else:
            error = math.sqrt(max(priced.errors[pick], 0.0))
            planned.append(PlannedSite(priced.site, priced.decomposition, structure, error))
    return tuple(planned), dense
