"""A plan found by trying whole models: what layers count is searched, and plans of one method alone are compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch import nn

from compresskit.calibration.compare import MARGIN, TOGETHER, compare_plans
from compresskit.calibration.data import Batch
from compresskit.calibration.search import search_sensitivities
from compresskit.calibration.trials import Found, Judge, Trials
from compresskit.core.importance import Importance
from compresskit.surgery.pricing import OnProgress, Planned, Progress
from compresskit.surgery.rivals import alone, rivals_of
from compresskit.surgery.rules import Assignment

Measure = Sequence[Batch] | Judge
PlanFor = Callable[[Assignment, Mapping[str, float] | None], Planned]
"""The plan of some rules for some sensitivities, by name of each site what its squared relative error counts."""


def tried_plan(
    model: nn.Module,
    assignment: Assignment,
    plan_for: PlanFor,
    importances: Mapping[str, Importance],
    sensitivities: Mapping[str, float] | None,
    *,
    search: Measure | None,
    compare: Measure | None,
    robust: bool,
    on_progress: OnProgress | None,
) -> Found | None:
    """The best plan that was tried; None if there was nothing to try.

    With both, what layers count is searched for each method alone as well, since that need not be the same, and the
    best plans of all are compared.

    Args:
        search, compare: samples, or a judge; None: not done.
        sensitivities: to start from; None: parameters.
        robust: fit for inputs that are off.
        on_progress: called after each fit and each model.
    """
    start = sensitivities or {site.name: float(site.num_params) for site, _ in assignment.chosen}
    tests = _Tests(model, plan_for, importances, start, robust=robust, on_progress=on_progress)
    if compare is None:
        if search is None:
            return None
        trials, factors = tests.searched(assignment, search)
        return trials.found.saying({}, factors)
    planned = plan_for(assignment, sensitivities)
    rivals = rivals_of(planned, assignment, start, lambda other: plan_for(other, sensitivities))
    margin = 1.0 if callable(compare) else MARGIN
    if search is not None:
        return tests.best_of_searches(assignment, rivals, search, compare, margin)
    if not rivals:
        return None
    trials = tests.trials(compare, margin=margin)
    errors = compare_plans(trials, planned, rivals, on_progress=on_progress)
    return trials.found.saying(errors, {})


@final
class _Tests:
    """What tests of one model share."""

    def __init__(
        self,
        model: nn.Module,
        plan_for: PlanFor,
        importances: Mapping[str, Importance],
        start: Mapping[str, float],
        *,
        robust: bool,
        on_progress: OnProgress | None,
    ) -> None:
        self._model, self._plan_for, self._importances, self._start = model, plan_for, importances, start
        self._robust, self._on_progress = robust, on_progress

    def trials(self, by: Measure, *, before: Trials | None = None, margin: float = 1.0) -> Trials:
        how: dict[str, Any] = {"robust": self._robust, "on_progress": self._on_progress}
        return Trials(self._model, by, self._importances, before=before, margin=margin, **how)

    def searched(self, rules: Assignment, by: Measure) -> tuple[Trials, Mapping[str, float]]:
        """The trials of a search, the best plan among them, and by how much it has shapes count more or less."""
        trials = self.trials(by)
        factors = search_sensitivities(
            self._model, lambda some: self._plan_for(rules, some), trials, self._start, on_progress=self._on_progress
        )
        return trials, factors

    def best_of_searches(
        self, assignment: Assignment, rivals: Mapping[str, Planned], search: Measure, compare: Measure, margin: float
    ) -> Found:
        """The rules and each rival's searched, and the best plans of all compared."""
        best: tuple[Found, str, Mapping[str, float]] | None = None
        errors: dict[str, float] = {}
        for name in (TOGETHER, *rivals):
            trials, factors = self.searched(assignment if name == TOGETHER else alone(assignment, name), search)
            found = trials.found
            if compare is not search:
                judged = self.trials(compare, before=trials)
                judged.squared_error(found.planned)
                found = judged.found
            errors[name] = found.squared_error**0.5
            if self._on_progress is not None:
                self._on_progress(Progress("rivals", name, len(errors), 1 + len(rivals), errors[name]))
            if best is None or found.squared_error * margin < best[0].squared_error:
                best = found, name, factors
        assert best is not None
        found, taken, factors = best
        return found.saying({taken: errors[taken], **errors} if rivals else {}, factors)
