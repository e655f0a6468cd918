"""Searched sensitivities: what layers count, by what whole compressed models make of the samples.

The budget adds up errors of layers. What that leaves out is most where most is compressed: errors of some layers, such
as a word embedding, spoil all that comes after, and those of others hardly matter. So layers of one shape get a factor
on what their errors count; for some factors the budget is solved, everything fitted, and the compressed model run on
the samples; the factors whose model answers nearest to the dense one are taken. One shape after the other, by factors
of four and then of two; what has been priced and fitted is not priced and fitted again.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from compresskit.calibration.answers import Answers
from compresskit.calibration.data import Batch
from compresskit.calibration.weights import expecting_errors
from compresskit.core.decomposition import Analysis
from compresskit.core.importance import Importance
from compresskit.core.structure import Structure
from compresskit.errors import CalibrationError
from compresskit.surgery.apply import SiteFit, apply_, fit_site
from compresskit.surgery.parallel import map_in_threads
from compresskit.surgery.plan import PlannedSite
from compresskit.surgery.pricing import OnProgress, Planned, Progress
from compresskit.surgery.sites import find_sites

STEPS = (4.0, 2.0)
"""Factors by which what a shape counts is changed, one round with each."""

FitKey = tuple[str, Structure, float]
"""Site, structure, and the noise that the fit expects."""
PlanOf = Callable[[Mapping[str, float]], Planned]


@final
@dataclass(frozen=True)
class Found:
    """The best plan that was tried, and its fits by site name."""

    planned: Planned
    fits: Mapping[str, SiteFit]


def search_plan(
    model: nn.Module,
    plan_of: PlanOf,
    batches: Sequence[Batch],
    importances: Mapping[str, Importance],
    start: Mapping[str, float],
    *,
    robust: bool = False,
    on_progress: OnProgress | None = None,
) -> Found:
    """The plan for the sensitivities that do best; never worse on the samples than that for the start.

    Takes the memory of a second model, and of the factors of two compressed ones.

    Args:
        plan_of: the plan for some sensitivities, by name of each site what its squared relative error counts.
        batches: samples, as `list(read_batches(...))`.
        importances: by site name; what fits go by.
        start: sensitivities of all sites.
        robust: fit for inputs that are off, as `expecting_errors` says.
        on_progress: called after each compressed model.

    Raises:
        CalibrationError: no samples, or the model returns neither a last hidden state nor logits.
    """
    if not batches:
        raise CalibrationError("sensitivities are searched on samples: give batches, as list(read_batches(...))")
    shapes: dict[object, list[str]] = {}
    for site in find_sites(model).sites:
        if site.name in start:
            shapes.setdefault((site.rows, site.cols, site.kinds), []).append(site.name)
    usual = 1 + 2 * len(STEPS) * len(shapes)
    trials = _Trials(model, plan_of, batches, importances, robust=robust, usual=usual, on_progress=on_progress)
    best = dict(start)
    least = trials.error(best)
    for step, names in itertools.product(STEPS, shapes.values() if len(shapes) > 1 else ()):
        for factor in (step, 1 / step):
            tried = _times(best, names, factor)
            while (error := trials.error(tried)) < least:
                best, least, tried = tried, error, _times(tried, names, factor)
    return trials.found


def _times(sensitivities: Mapping[str, float], names: Sequence[str], factor: float) -> dict[str, float]:
    return {name: value * factor if name in names else value for name, value in sensitivities.items()}


def _ignore(_: object) -> None:
    """The search shows whole models, not their layers."""


@final
class _Trials:
    """Compressed models and their errors. Errors are remembered, and the fits of the best and of the last model."""

    found: Found
    """The best so far; there is one after the first."""

    def __init__(
        self,
        model: nn.Module,
        plan_of: PlanOf,
        batches: Sequence[Batch],
        importances: Mapping[str, Importance],
        *,
        robust: bool,
        usual: int,
        on_progress: OnProgress | None,
    ) -> None:
        self._robust, self._usual = robust, usual
        self._model, self._plan_of, self._importances = model, plan_of, importances
        self._on_progress = on_progress
        self._best: dict[FitKey, SiteFit] = {}
        self._last: dict[FitKey, SiteFit] = {}
        self._errors: dict[frozenset[tuple[str, Structure]], float] = {}
        self._answers = Answers(model, batches)

    def error(self, sensitivities: Mapping[str, float]) -> float:
        """Squared relative error of the answers on the samples."""
        planned = self._plan_of(sensitivities)
        key = frozenset((site.site.name, site.structure) for site in planned.plan.sites)
        if key not in self._errors:
            self._errors[key] = error = self._try(planned)
            if self._on_progress is not None:
                done = len(self._errors)
                self._on_progress(Progress("search", f"model {done}", done, max(done, self._usual), error**0.5))
        return self._errors[key]

    def _try(self, planned: Planned) -> float:
        plan, device = planned.plan, next(self._model.parameters()).device
        importances = expecting_errors(self._importances, plan) if self._robust else self._importances
        analyses = {} if self._robust else planned.analyses

        def fit(site: PlannedSite) -> tuple[FitKey, SiteFit]:
            return self._fit(site, importances.get(site.site.name), analyses.get(site.site.name))

        self._last = dict(map_in_threads(fit, plan.sites, device=device, on_done=_ignore))
        fits = {name: fit for (name, _, _), fit in self._last.items()}
        small = copy.deepcopy(self._model)
        apply_(small, plan, importances=importances, fits=fits)
        error = self._answers.squared_error(small)
        if not self._errors or error < min(self._errors.values()):
            self._best, self.found = self._last, Found(planned, fits)
        return error

    def _fit(
        self, planned: PlannedSite, importance: Importance | None, analysis: Analysis | None
    ) -> tuple[FitKey, SiteFit]:
        key = (planned.site.name, planned.structure, 0.0 if importance is None else importance.noise)
        known = self._last.get(key) or self._best.get(key)
        return key, known or fit_site(self._model, planned, importance, analysis)
