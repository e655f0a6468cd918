"""A plan found by trying whole models: what layers count is searched, and plans of one method alone are compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from compresskit.calibration.compare import MARGIN, TOGETHER, compare_plans
from compresskit.calibration.data import Batch
from compresskit.calibration.search import search_sensitivities
from compresskit.calibration.trials import Found, Judge, Trials
from compresskit.core.importance import Importance
from compresskit.surgery.pricing import OnProgress, Planned
from compresskit.surgery.rivals import alone, rivals_of
from compresskit.surgery.rules import Assignment

PlanFor = Callable[[Assignment, Mapping[str, float] | None], Planned]
"""The plan of some rules for some sensitivities, by name of each site what its squared relative error counts."""


def tried_plan(
    model: nn.Module,
    assignment: Assignment,
    plan_for: PlanFor,
    importances: Mapping[str, Importance],
    sensitivities: Mapping[str, float] | None,
    *,
    search: Sequence[Batch] | Judge | None,
    compare: Sequence[Batch] | Judge | None,
    robust: bool,
    on_progress: OnProgress | None,
) -> Found | None:
    """The best plan that was tried; None if there was nothing to try.

    First the search, then the comparison for what layers were found to count. If a method alone is taken, what layers
    count is searched for it again: that need not be the same.

    Args:
        search, compare: samples, or a judge; None: not done.
        sensitivities: to start from; None: parameters.
        robust: fit for inputs that are off.
        on_progress: called after each fit and each model.
    """
    start = sensitivities or {site.name: float(site.num_params) for site, _ in assignment.chosen}
    how: dict[str, Any] = {"robust": robust, "on_progress": on_progress}
    found: Found | None = None
    trials: Trials | None = None
    factors: dict[str, float] = {}
    errors: dict[str, float] = {}

    def searched(rules: Assignment, by: Sequence[Batch] | Judge) -> Found:
        nonlocal start, trials
        trials = Trials(model, by, importances, before=trials, **how)
        best = search_sensitivities(model, lambda some: plan_for(rules, some), trials, start, on_progress=on_progress)
        start = best.sensitivities
        for shape, factor in best.factors.items():
            factors[shape] = factors.get(shape, 1.0) * factor
        return trials.found

    if search is not None:
        found = searched(assignment, search)
    if compare is not None:
        planned = plan_for(assignment, sensitivities) if found is None else found.planned
        rivals = rivals_of(planned, assignment, start, lambda other: plan_for(other, start))
        if rivals:
            margin = 1.0 if callable(compare) else MARGIN
            trials = Trials(model, compare, importances, before=trials, margin=margin, **how)
            errors = compare_plans(trials, planned, rivals, on_progress=on_progress)
            taken, found = next(iter(errors)), trials.found
            if search is not None and taken != TOGETHER:
                found = searched(alone(assignment, taken), search)
                errors[taken] = found.squared_error**0.5
    return None if found is None else found.saying(errors, {shape: f for shape, f in factors.items() if f != 1})
