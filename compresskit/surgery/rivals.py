"""Rivals of a plan: where a method chooses between several, plans with each of these alone that lose hardly more."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from compresskit.errors import BudgetError
from compresskit.surgery.plan import Plan
from compresskit.surgery.pricing import Planned
from compresskit.surgery.rules import Assignment

CLOSE = 1.1
"""A rival loses at most so many times as much: the sum of squared errors that budgets minimise."""


def rivals_of(
    planned: Planned,
    assignment: Assignment,
    weights: Mapping[str, float],
    plan_of: Callable[[Assignment], Planned],
) -> dict[str, Planned]:
    """Plans of one method alone wherever the rules choose between several, by its name; the closest first.

    Left out are those that lose much more, and those that cannot keep the budget.

    Args:
        planned: what the rules themselves give.
        weights: by site name, what its squared relative error counts.
        plan_of: the plan of other rules; knows the prices that `planned` was chosen by.
    """
    most = CLOSE * _loss(planned.plan, weights)
    close: list[tuple[float, str, Planned]] = []
    for name in dict.fromkeys(name for _, method in assignment.chosen for name in method.alone()):
        try:
            rival = plan_of(alone(assignment, name))
        except BudgetError:
            continue
        if (loss := _loss(rival.plan, weights)) <= most:
            close.append((loss, name, rival))
    return {name: rival for _, name, rival in sorted(close, key=lambda rival: rival[0])}


def _loss(plan: Plan, weights: Mapping[str, float]) -> float:
    errors = {site.site.name: math.inf if site.expected_error is None else site.expected_error for site in plan.sites}
    return sum(weights[name] * error**2 for name, error in errors.items())


def alone(assignment: Assignment, name: str) -> Assignment:
    """The same rules with one method alone where they choose between several, and it is one of them."""
    chosen = tuple((site, method.alone().get(name, method)) for site, method in assignment.chosen)
    return dataclasses.replace(assignment, chosen=chosen)
