"""Limits of a plan beside its size, and the choices between which the budget decides."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from compresskit.core.cost import Target
from compresskit.core.structure import Structure
from compresskit.errors import BudgetError, PlanError
from compresskit.surgery.budget import Choice
from compresskit.surgery.plan import site_macs, site_time_ns
from compresskit.surgery.rules import Assignment
from compresskit.surgery.sites import Site

MAX_CHOICES = 6000
"""Choices that the solver gets in all; menus that are finer (one rank after the other) are thinned."""


@final
@dataclass(frozen=True)
class Limits:
    """What the assigned sites may take together; None: no limit.

    Args:
        params: parameters.
        macs: multiply-adds per token.
        speed: expected time while dense / as planned, at least.
        dense_ns: expected time of the same sites while dense.
    """

    params: int
    macs: int | None
    speed: float | None
    dense_ns: int

    @property
    def time_ns(self) -> int | None:
        """Expected time, at most."""
        return None if self.speed is None else math.floor(self.dense_ns / self.speed)

    @property
    def of_work(self) -> bool:
        return not (self.macs is None and self.speed is None)

    def unreachable(self, least_ns: float) -> BudgetError:
        """The error if the least time that can be reached is above the limit."""
        highest = four_digits_down(self.dense_ns / least_ns)
        return BudgetError(
            f"speed {self.speed:.4g} cannot be reached with {self.params:,} parameters in "
            f"these layers; the highest expected speed-up that these rules reach is {highest:.4g}"
        )


def limits_of(assignment: Assignment, max_params: int, max_macs: int | None, speed: float | None) -> Limits:
    """The limits of the sites that rules chose.

    Raises:
        BudgetError: the speed makes no sense.
    """
    if speed is not None and not (math.isfinite(speed) and speed >= 1):
        raise BudgetError(
            f"speed is the expected time of the dense layers / of what replaces them, at least 1; got {speed:g}"
        )
    dense_ns = sum(site_time_ns(site, None, assignment.target) for site, _ in assignment.chosen)
    return Limits(max_params, max_macs, speed, dense_ns)


def check_sensitivities(assignment: Assignment, sensitivities: Mapping[str, float] | None) -> None:
    """Raise PlanError unless each assigned site has one, or there are none at all."""
    for site, _ in assignment.chosen:
        value = None if sensitivities is None else sensitivities.get(site.name, math.nan)
        if value is not None and not 0 <= value < math.inf:
            raise PlanError(f"the sensitivity of {site.name!r} must be a number of at least 0, got {value}")


def choice_of(site: Site, structure: Structure | None, loss: float, target: Target) -> Choice:
    """What a structure, or None for the dense weight, costs."""
    time_ns = site_time_ns(site, structure, target)
    if structure is None:
        return Choice(site.num_params, site.multiplied * site.num_params, 0.0, time_ns)
    params = structure.num_params + site.extra_params
    return Choice(params, site_macs(site, structure), loss, time_ns)


def thinned(choices: Sequence[Choice], size: int, *, of_loss: bool, of_work: bool) -> list[int]:
    """About `size` of the choices: the best of each of `size` intervals, even on a log scale, and the smallest.

    Args:
        of_loss: keep what loses least; the losses are known.
        of_work: keep what is fastest, and what does the fewest multiply-adds.
    """
    if len(choices) <= size:
        return list(range(len(choices)))
    wanted: list[Callable[[int], tuple[float, int]]] = []
    if of_loss:
        wanted += [lambda i: (choices[i].loss, 0)]
    if of_work:
        wanted += [lambda i: (choices[i].time_ns, choices[i].params), lambda i: (choices[i].macs, choices[i].params)]
    low, high = math.log(min(c.params for c in choices)), math.log(max(c.params for c in choices))
    bins: dict[int, list[int]] = {}
    for i, choice in enumerate(choices):
        bins.setdefault(int((math.log(choice.params) - low) / (high - low) * size), []).append(i)
    kept = {min(indices, key=by) for indices in bins.values() for by in wanted}
    smallest = {min(range(len(choices)), key=lambda i: (choices[i].params, *by(i))) for by in wanted}
    return sorted({0, *smallest, *kept})


def four_digits_down(ratio: float) -> float:
    """Rounded down, so that what an error says can be reached."""
    digits: float = 10 ** (3 - math.floor(math.log10(ratio)))
    return math.floor(ratio * digits) / digits


def shortest_ratio(total: int, left: int) -> float:
    """The ratio with the fewest digits that leaves so many of all parameters: most likely the one that was asked."""
    if left < 1:
        return math.inf
    ratios = (float(f"{total / left:.{digits}g}") for digits in range(1, 17))
    return next((ratio for ratio in ratios if ratio and math.floor(total / ratio) == left), total / left)


def choices_each(groups: int) -> int:
    """Choices that the solver gets of each of so many groups; menus that are finer are thinned."""
    return max(MAX_CHOICES // groups, 32)
