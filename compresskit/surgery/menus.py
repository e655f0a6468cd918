"""Which structures are worth a price: of each site's menu those near the size that the budget asks for."""

from collections.abc import Mapping, Sequence

from compresskit.core.cost import Target
from compresskit.core.decomposition import Decomposition
from compresskit.core.structure import Structure
from compresskit.errors import BudgetError
from compresskit.surgery.budget import Choice, least_time_ns
from compresskit.surgery.limits import (
    Limits,
    choice_of,
    choices_each,
    four_digits_down,
    shortest_ratio,
    thinned,
)
from compresskit.surgery.plan import runs_slower
from compresskit.surgery.rules import Assignment
from compresskit.surgery.sites import Site

SMALLER, LARGER = 4, 8
"""Structures between the average size over SMALLER and times LARGER are priced; more only if these do not reach."""
SLOWER = "every structure that the method has for it is expected to run slower than dense (allow_slower permits them)"
NOTHING_FAST = "no structure as fast as dense"
"""`SLOWER` in short."""
NEAR = 1.5
"""Of methods whose prices are dear, those up to so many times smaller or larger than the budget's first choice."""
MOVED = 1.3
"""A choice that has become so many times smaller or larger has others near it."""


def menus_of(assignment: Assignment, *, allow_slower: bool) -> dict[str, list[Structure]]:
    """Menu of each site by its name; sites that are alike share one, since a deep model has few shapes."""
    made: dict[object, list[Structure]] = {}
    menus: dict[str, list[Structure]] = {}
    for site, decomposition in assignment.chosen:
        key = (decomposition, site.rows, site.cols, site.kinds, site.extra_params)
        if key not in made:
            made[key] = _menu(site, decomposition, assignment.target, allow_slower=allow_slower)
        menus[site.name] = made[key]
    return menus


def _menu(site: Site, decomposition: Decomposition, target: Target, *, allow_slower: bool) -> list[Structure]:
    """Structures smaller than the weight; none that runs slower than the dense layer unless allowed."""
    return [
        structure
        for structure in decomposition.menu(site.rows, site.cols, lookup=site.lookup)
        if structure.num_params + site.extra_params < site.num_params
        and (allow_slower or not runs_slower(site, structure, target))
    ]


def planned_for(target: Target) -> str:
    """The end of an error about what is slow: where, and what to do."""
    return (
        f". Times are expected for {target}; allow_slower permits slower structures, and on another machine "
        "(compresskit machines lists them) they may be faster"
    )


def why_none(site: Site, decomposition: Decomposition) -> str:
    """Why the menu of a site is empty."""
    menu = decomposition.menu(site.rows, site.cols, lookup=site.lookup)
    smaller = any(s.num_params + site.extra_params < site.num_params for s in menu)
    return SLOWER if smaller else "the method has no structure for it"


def without_dear(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], limits: Limits
) -> Mapping[str, Sequence[Structure]]:
    """What to price first: of each site the structures of methods whose prices are not dear; all if all are dear.

    If these do not fit, also the smallest of each site.
    """
    cheap: dict[str, Sequence[Structure]] = {}
    for site, decomposition in assignment.chosen:
        menu = menus[site.name]
        cheap[site.name] = [s for s in menu if not decomposition.fitter(s).prices_dearly] or menu
    if _fits(assignment, cheap, limits):
        return cheap
    least = {name: min((s.num_params for s in menu), default=0) for name, menu in menus.items()}
    known = {name: set(menu) for name, menu in cheap.items()}
    return {name: [s for s in menu if s in known[name] or s.num_params == least[name]] for name, menu in menus.items()}


def near_size(structures: Sequence[Structure], size: int) -> list[Structure]:
    """Those of about so many parameters; where all have fewer, of about as many as the largest."""
    size = min(size, max((s.num_params for s in structures), default=size))
    return [s for s in structures if size / NEAR <= s.num_params <= size * NEAR]


def refuse_unreachable(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], rest: int, num_params: int, max_params: int
) -> None:
    """Raise BudgetError if the smallest structures together are too large; `rest` is what no rule touches."""
    least = {site.name: _least(site, menus[site.name]) for site, _ in assignment.chosen}
    floor = rest + sum(least.values())
    if floor <= max_params:
        return
    reasons = {
        site.name: "its smallest structure" if menus[site.name] else why_none(site, decomposition)
        for site, decomposition in assignment.chosen
    }
    slow = any(reason == SLOWER for reason in reasons.values())
    holders = [(r.num_params, r.name, r.reason) for r in assignment.left]
    holders += [(least[name], name, reason.replace(SLOWER, NOTHING_FAST)) for name, reason in reasons.items()]
    biggest = "; ".join(f"{name} {n:,} ({reason})" for n, name, reason in sorted(holders, reverse=True)[:4])
    raise BudgetError(
        f"ratio {shortest_ratio(num_params, max_params):.6g} leaves {max_params:,} of {num_params:,} parameters; the "
        f"highest ratio that these rules reach is {four_digits_down(num_params / floor):.4g} ({floor:,} parameters, "
        f"{rest:,} of them in what no rule touches). Most is held by: {biggest}"
        + (planned_for(assignment.target) if slow else "")
    )


def narrowed(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], limits: Limits, *, uniform: bool
) -> Mapping[str, Sequence[Structure]]:
    """What to price: structures around the average compression, wider until the limits can be kept, or all.

    A site that cannot be compressed nearly that much keeps its smallest structure.

    Raises:
        BudgetError: nothing is fast enough.
    """
    average = sum(site.num_params for site, _ in assignment.chosen) / max(limits.params, 1)
    smaller, larger = float(SMALLER), float(LARGER)

    def near_average(site: Site) -> Sequence[Structure]:
        menu = menus[site.name]
        near = [s for s in menu if average / larger <= site.num_params / s.num_params <= average * smaller]
        return near or sorted(menu, key=lambda s: s.num_params)[:1]

    while True:
        near = {site.name: near_average(site) for site, _ in assignment.chosen}
        complete = near == menus
        if complete or _fits(assignment, near, limits):
            least_ns = 0.0 if limits.time_ns is None else _least_time_ns(assignment, near, limits, uniform=uniform)
            if limits.time_ns is None or least_ns <= limits.time_ns:
                return near
            if complete:
                raise limits.unreachable(least_ns)
        smaller, larger = smaller * 4, larger * 4 if limits.of_work else larger


def _fits(assignment: Assignment, menus: Mapping[str, Sequence[Structure]], limits: Limits) -> bool:
    """Whether the smallest structures keep the limit of parameters, and the cheapest that of multiply-adds."""
    if sum(_least(site, menus[site.name]) for site, _ in assignment.chosen) > limits.params:
        return False
    target = assignment.target
    groups = (
        [choice_of(site, s, 0.0, target).macs for s in (None, *menus[site.name])] for site, _ in assignment.chosen
    )
    return limits.macs is None or sum(map(min, groups)) <= limits.macs


def _least_time_ns(
    assignment: Assignment, menus: Mapping[str, Sequence[Structure]], limits: Limits, *, uniform: bool
) -> float:
    """Least time within the limit of parameters that the solver will find in these menus, whatever the errors."""
    choices: dict[object, list[Choice]] = {}
    groups: dict[object, list[object]] = {}
    for site, decomposition in assignment.chosen:
        key = (decomposition, site.rows, site.cols, site.kinds, site.extra_params)
        if key not in choices:
            choices[key] = [choice_of(site, s, 0.0, assignment.target) for s in (None, *menus[site.name])]
        groups.setdefault(key if uniform else site.name, []).append(key)
    size = choices_each(len(groups))
    return least_time_ns([_alike(choices[keys[0]], len(keys), size) for keys in groups.values()], limits.params)


def _alike(choices: Sequence[Choice], number: int, size: int) -> list[Choice]:
    """The fast choices of as many equal sites together."""
    kept = [choices[i] for i in thinned(choices, size, of_loss=False, of_work=True)]
    return [Choice(number * c.params, number * c.macs, 0.0, number * c.time_ns) for c in kept]


def _least(site: Site, menu: Sequence[Structure]) -> int:
    """Fewest parameters that a site can have."""
    return min((s.num_params + site.extra_params for s in menu), default=site.num_params)
