"""From rules and a budget to a plan: analyse every site once, price its menu, let the budget choose."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from compresskit.core.cost import Target
from compresskit.core.decomposition import Analysis, Decomposition, as_matrix, squared_norm
from compresskit.core.importance import Importance
from compresskit.core.structure import Structure
from compresskit.errors import BudgetError
from compresskit.surgery.alternatives import Fronts, best_within, fronts_of, undominated
from compresskit.surgery.budget import Choice, TimeLimitError, solve
from compresskit.surgery.front import front_of
from compresskit.surgery.limits import (
    Limits,
    check_sensitivities,
    choice_of,
    choices_each,
    limits_of,
    thinned,
)
from compresskit.surgery.menus import (
    MOVED,
    SLOWER,
    menus_of,
    narrowed,
    near_size,
    planned_for,
    refuse_unreachable,
    why_none,
    without_dear,
)
from compresskit.surgery.parallel import map_in_threads
from compresskit.surgery.plan import FrontPoint, Plan, PlannedSite
from compresskit.surgery.rules import Assignment
from compresskit.surgery.sites import Refusal, Site, site_weight


@final
@dataclass(frozen=True)
class Progress:
    """One step of long work, for whoever shows it.

    Args:
        stage: `analyse`, `compare` (prices near what was chosen first, for methods whose prices are dear) or `fit`.
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
Asked = tuple[Site, Decomposition, Sequence[Structure]]
"""A site, who prices, and what."""


@final
@dataclass(frozen=True)
class Planned:
    """A plan, and the analyses that fitting can go on from (by site name; those worth their memory)."""

    plan: Plan
    analyses: Mapping[str, Analysis]


@final
@dataclass(frozen=True)
class _Known:
    """What is known of a site.

    Args:
        prices: squared relative errors of all that was priced.
        energy: what a squared error is relative to.
        analysis: worth its memory, or None.
        fronts: of each method that was priced beside others.
    """

    site: Site
    prices: Mapping[Structure, float]
    energy: float
    analysis: Analysis | None
    fronts: Fronts


@final
@dataclass(frozen=True)
class _Priced:
    """A site with what it may become; `structures[0]` is None: it may stay dense.

    Args:
        weight: what its squared relative error counts in the loss.
        target: what it is to be fast for.
    """

    site: Site
    decomposition: Decomposition
    structures: tuple[Structure | None, ...]
    errors: tuple[float, ...]
    known: _Known
    weight: float
    target: Target

    def choices(self) -> list[Choice]:
        pairs = zip(self.structures, self.errors, strict=True)
        return [choice_of(self.site, structure, error * self.weight, self.target) for structure, error in pairs]


Known = dict[str, _Known]
"""By site name what has been priced."""


def make_plan(
    model: nn.Module,
    assignment: Assignment,
    *,
    num_params: int,
    max_params: int | None,
    max_macs: int | None = None,
    speed: float | None = None,
    uniform: bool = False,
    allow_slower: bool = False,
    importances: Mapping[str, Importance] | None = None,
    sensitivities: Mapping[str, float] | None = None,
    known: "Known | None" = None,
    on_progress: OnProgress | None = None,
) -> Planned:
    """The plan that loses least within the budget. Reads the model, changes nothing.

    The loss is the squared relative error of a site times its number of parameters, summed: it does not depend on
    the scale of a layer's weight, which the following normalisation undoes. Where a site has an importance, the
    error is weighted and relative to the weighted norm: the mean squared error of the layer's output over its variance.

    Args:
        assignment: which decomposition for which site, from `rules.assign`.
        num_params: parameters of the model, from the survey.
        max_params: parameters that the whole compressed model may have; None: options leave one structure per site,
            or the size is limited by `max_macs` or `speed` alone.
        max_macs: multiply-adds per token that the assigned sites may take together; None: no limit.
        speed: expected time of the assigned sites while dense / as planned, at least; None: no limit.
        uniform: all sites of one shape and method get the same structure, as in the papers.
        allow_slower: also consider structures that take more multiply-adds than the dense layer, or longer.
        importances: by site name, which errors matter.
        sensitivities: by site name, what a squared relative error of 1 costs the model; then they stand in place of the
            number of parameters, for all sites.
        known: what has been priced for other sensitivities, or by methods that choose from more, and is not priced
            again; is added to.

    Raises:
        PlanError: a sensitivity is missing or negative.
        OptionError: a site has an importance, and its decomposition no data-aware fit.
        BudgetError: the rules cannot reach the budget; says what they reach and what holds them back.
        WeightError: a weight holds NaN or infinity, or is no real matrix; names it.
    """
    check_sensitivities(assignment, sensitivities)
    menus: Mapping[str, Sequence[Structure]] = menus_of(assignment, allow_slower=allow_slower)
    rest = num_params - sum(site.num_params for site, _ in assignment.chosen)
    choice = any(len(menu) > 1 for menu in menus.values())
    if max_params is None and choice and not (max_macs is None and speed is None):
        max_params = num_params
    limits = limits_of(assignment, (max_params or num_params) - rest, max_macs, speed)
    if max_params is None:
        _refuse_choice(assignment, menus)
    else:
        refuse_unreachable(assignment, menus, rest, num_params, max_params)
        menus = narrowed(assignment, menus, limits, uniform=uniform)
    keep_all = uniform or limits.of_work or max_params is None

    known = {} if known is None else known

    def price(asked: Asked) -> _Known:
        name = asked[0].name
        return _price(model, *asked, (importances or {}).get(name), known.get(name))

    def price_all(stage: str, asked: Sequence[Asked]) -> list[_Priced]:
        new = [one for one in asked if one[0].name not in known or not known[one[0].name].prices.keys() >= {*one[2]}]
        known.update((k.site.name, k) for k in _price_all(model, stage, new, price, on_progress))
        return [
            _offer(known[site.name], method, weight, assignment.target, keep_all=keep_all)
            for site, method in assignment.chosen
            for weight in [site.num_params if sensitivities is None else sensitivities[site.name]]
        ]

    front: tuple[FrontPoint, ...]
    first = menus if max_params is None or limits.of_work else without_dear(assignment, menus, limits)
    asked = [
        (site, method, _without_new_dear(method, first[site.name], known.get(site.name)))
        for site, method in assignment.chosen
    ]
    for site, _ in assignment.chosen:  # what a search that may take minutes would find at its end
        if site.name not in known:
            as_matrix(site_weight(model, site), _named(site))
    priced = price_all("analyse", asked)
    if max_params is None:
        picks, gap, front = [(p, len(p.structures) - 1) for p in priced], 0.0, ()
        _refuse_work(picks, limits)
    else:
        picks, gap, front = _solve(priced, limits, num_params, uniform=uniform)
        centres: dict[str, int] = {}
        while asked := _dear_near(picks, menus, centres):
            picks, gap, front = _solve(price_all("compare", asked), limits, num_params, uniform=uniform)
    planned, dense = _sort_picks(picks)
    if not planned:
        raise BudgetError(f"every site would stay dense: {_why_dense(dense, assignment.target)}")
    plan = Plan(planned, (*assignment.left, *dense), num_params, assignment.coverage, gap, front)
    return Planned(plan, {p.site.name: p.known.analysis for p in priced if p.known.analysis is not None})


def _without_new_dear(method: Decomposition, menu: Sequence[Structure], known: _Known | None) -> Sequence[Structure]:
    """Where a site has prices, those that are dear and missing wait until the budget has said the size."""
    if known is None:
        return menu
    return [s for s in menu if s in known.prices or not method.fitter(s).prices_dearly]


def _dear_near(
    picks: Sequence[tuple[_Priced, int]], menus: Mapping[str, Sequence[Structure]], centres: dict[str, int]
) -> list[Asked]:
    """What has no price, is dear and near the size of a site's pick, unless that has hardly moved from `centres`.

    Brings these up to date. Where the pick is the dense weight, the largest structures are the nearest: without their
    prices it would stay dense.
    """
    asked: list[Asked] = []
    for priced, pick in picks:
        site, structure = priced.site, priced.structures[pick]
        size = site.num_params if structure is None else structure.num_params
        centre = centres.get(site.name, 0)
        if centre / MOVED <= size <= centre * MOVED:
            continue
        centres[site.name] = size
        dear = [s for s in menus[site.name] if priced.decomposition.fitter(s).prices_dearly]
        if new := [s for s in near_size(dear, size) if s not in priced.known.prices]:
            asked.append((site, priced.decomposition, new))
    return asked


def _why_dense(dense: Sequence[Refusal], target: Target) -> str:
    if any(refusal.reason == SLOWER for refusal in dense):
        return f"for {dense[0].name!r} and others, {SLOWER}{planned_for(target)}"
    return "the budget is too generous, or the method has no structure"


def _refuse_choice(assignment: Assignment, menus: Mapping[str, Sequence[Structure]]) -> None:
    for site, decomposition in assignment.chosen:
        if len(menus[site.name]) > 1:
            raise BudgetError(
                f"{decomposition.name} has {len(menus[site.name])} structures for {site.name!r}, nothing to choose by: "
                "give ratio, params or keep, or options that fix the structure"
            )


def _refuse_work(picks: Sequence[tuple[_Priced, int]], limits: Limits) -> None:
    """Raise BudgetError if structures that leave no choice take more than the limits."""
    choices = [priced.choices()[pick] for priced, pick in picks]
    macs, time_ns = sum(choice.macs for choice in choices), sum(choice.time_ns for choice in choices)
    if limits.macs is not None and macs > limits.macs:
        raise BudgetError(f"these options take {macs:,} multiply-adds per token together, more than {limits.macs:,}")
    if limits.time_ns is not None and time_ns > limits.time_ns:
        raise limits.unreachable(time_ns)


def _price_all(
    model: nn.Module,
    stage: str,
    asked: Sequence[Asked],
    price: Callable[[Asked], _Known],
    on_progress: OnProgress | None,
) -> list[_Known]:
    total, numbers = len(asked), itertools.count(1)

    def show(known: _Known) -> None:
        if on_progress is not None:
            on_progress(Progress(stage, known.site.name, next(numbers), total))

    device = next(model.parameters()).device
    return map_in_threads(price, asked, device=device, on_done=show, size=lambda one: one[0].num_params)


def _named(site: Site) -> str:
    return f"the weight of {site.name!r}"


def _price(
    model: nn.Module,
    site: Site,
    decomposition: Decomposition,
    menu: Sequence[Structure],
    importance: Importance | None,
    before: _Known | None,
) -> _Known:
    """Prices of a menu, beside those of `before`."""
    prices = dict(before.prices) if before else {}
    menu = [structure for structure in menu if structure not in prices]
    weight = site_weight(model, site)
    matrix = as_matrix(weight, _named(site))
    analysis = (before and before.analysis) or decomposition.analyse_for(matrix, importance)
    if before:
        energy = before.energy
    else:
        energy = squared_norm(matrix) if importance is None else importance.squared_norm(matrix)
    squared = analysis.squared_errors(menu)
    prices.update((s, 0.0 if energy == 0 else error / energy) for s, error in zip(menu, squared, strict=True))
    kinds = decomposition.structures
    own = [s for s in prices if isinstance(s, kinds)]
    fronts = {**(before.fronts if before else {}), **fronts_of(decomposition, own, [prices[s] for s in own])}
    same_memory = matrix.data_ptr() == weight.data_ptr()  # a widened copy of every weight would double the memory
    return _Known(site, prices, energy, analysis if same_memory else None, fronts)


def _offer(known: _Known, decomposition: Decomposition, weight: float, target: Target, *, keep_all: bool) -> _Priced:
    """What a method offers of what was priced. Unless all is kept, only what loses less than everything smaller: no
    other can be chosen."""
    kinds = decomposition.structures
    kept = [(s, e) for s, e in known.prices.items() if isinstance(s, kinds) and math.isfinite(e)]
    if not keep_all:
        kept = [kept[i] for i in undominated([s.num_params for s, _ in kept], [e for _, e in kept])]
    structures, errors = (None, *(s for s, _ in kept)), (0.0, *(e for _, e in kept))
    return _Priced(known.site, decomposition, structures, errors, known, weight, target)


def _solve(
    priced: Sequence[_Priced], limits: Limits, num_params: int, *, uniform: bool
) -> tuple[list[tuple[_Priced, int]], float, tuple[FrontPoint, ...]]:
    """The pick for each site, in the order of `priced`, the proven gap, and the front around it."""
    groups = _group(priced, uniform=uniform)
    size = choices_each(len(groups))
    thin = [_thin(group, size, of_work=limits.of_work) for group in groups]
    choices = [_sum_choices(group) for group in thin]
    try:
        solution = solve(choices, max_params=limits.params, max_macs=limits.macs, max_time_ns=limits.time_ns)
    except TimeLimitError as error:
        raise limits.unreachable(error.least_time_ns) from error
    picks = {p.site.name: (p, pick) for group, pick in zip(thin, solution.picks, strict=True) for p in group}
    front = front_of(choices, limits, num_params=num_params, scale=sum(p.weight for p in priced))
    return [picks[p.site.name] for p in priced], solution.gap, front


def _group(priced: Sequence[_Priced], *, uniform: bool) -> list[list[_Priced]]:
    if not uniform:
        return [[p] for p in priced]
    groups: dict[object, list[_Priced]] = {}
    for p in priced:
        groups.setdefault((p.decomposition, p.structures, p.site.kinds, p.site.extra_params), []).append(p)
    return list(groups.values())


def _sum_choices(group: Sequence[_Priced]) -> list[Choice]:
    """Choices of sites that share one structure: everything adds up."""
    if len(group) == 1:
        return group[0].choices()
    return [
        Choice(
            sum(c.params for c in col), sum(c.macs for c in col), sum(c.loss for c in col), sum(c.time_ns for c in col)
        )
        for col in zip(*(p.choices() for p in group), strict=True)
    ]


def _thin(group: Sequence[_Priced], size: int, *, of_work: bool) -> list[_Priced]:
    kept = thinned(_sum_choices(group), size, of_loss=True, of_work=of_work)
    return [
        dataclasses.replace(p, structures=tuple(p.structures[i] for i in kept), errors=tuple(p.errors[i] for i in kept))
        for p in group
    ]


def _sort_picks(picks: Sequence[tuple[_Priced, int]]) -> tuple[tuple[PlannedSite, ...], list[Refusal]]:
    planned: list[PlannedSite] = []
    dense: list[Refusal] = []
    for priced, pick in picks:
        structure = priced.structures[pick]
        if structure is None:
            reason = (
                "the budget keeps it dense"
                if len(priced.structures) > 1
                else why_none(priced.site, priced.decomposition)
            )
            dense.append(Refusal(priced.site.name, priced.site.num_params, reason))
        else:
            error = math.sqrt(max(priced.errors[pick], 0.0))
            fitter = priced.decomposition.fitter(structure)
            others = best_within(priced.known.fronts, structure.num_params)
            planned.append(PlannedSite(priced.site, fitter, structure, priced.target, error, others))
    return tuple(planned), dense
