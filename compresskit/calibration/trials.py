"""Plans on trial: compressed models, and how far what they answer on samples is from the dense one."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import nn

from compresskit.calibration.answers import Answers
from compresskit.calibration.collect import undisturbed
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

Judge = Callable[[nn.Module], float]
"""How wrong a model is, at least 0, in whatever sense: what `compare` and `search` go by instead of answers."""
FitKey = tuple[str, Structure, float]
"""Site, structure, and the noise that the fit expects."""


@final
@dataclass(frozen=True)
class Found:
    """The best plan that was tried, its fits by site name, and the squared relative error of its answers."""

    planned: Planned
    fits: Mapping[str, SiteFit]
    squared_error: float

    def saying(self, compared: Mapping[str, float], searched: Mapping[str, float]) -> "Found":
        """The same, its plan saying what it was compared with and what was searched."""
        plan = replace(self.planned.plan, compared=tuple(compared.items()), searched=tuple(searched.items()))
        return replace(self, planned=replace(self.planned, plan=plan))


@final
class Trials:
    """Compressed models and their errors. Errors are remembered, and the fits of the best and of the last model.

    Takes the memory of the factors of three compressed models; what stays dense is shared.

    Args:
        by: samples, as `list(read_batches(...))`, on which answers are compared; or a function of one's own that says
            how wrong a compressed model is. Its square then is the squared error.
        importances: by site name; what fits go by.
        robust: fit for inputs that are off, as `expecting_errors` says.
        on_progress: called after each fit.
        before: other trials of this model and these importances; what the best of them fitted is not fitted again.
        margin: a later plan counts as better where its squared error is more than so many times smaller.

    Raises:
        CalibrationError: no samples, or the model returns no tensor to compare by; or the function gave no number of
            at least 0.
    """

    def __init__(
        self,
        model: nn.Module,
        by: Sequence[Batch] | Judge,
        importances: Mapping[str, Importance],
        *,
        robust: bool = False,
        before: "Trials | None" = None,
        margin: float = 1.0,
        on_progress: OnProgress | None = None,
    ) -> None:
        if not callable(by) and not by:
            raise CalibrationError("models are tried on samples: give batches, as list(read_batches(...))")
        self._model, self._importances, self._robust, self._margin = model, importances, robust, margin
        self._on_progress = on_progress
        self._best: dict[FitKey, SiteFit] = {} if before is None else before._best
        self._last: dict[FitKey, SiteFit] = {}
        self._errors: dict[frozenset[tuple[str, Structure]], float] = {}
        self._found: Found | None = None
        self._squared_error = _squared(by) if callable(by) else Answers(model, by).squared_error

    @property
    def number(self) -> int:
        """Models that were compressed."""
        return len(self._errors)

    @property
    def found(self) -> Found:
        """The best so far; of equals the first."""
        assert self._found is not None, "nothing has been tried"
        return self._found

    def squared_error(self, planned: Planned) -> float:
        """Squared relative error of the answers on the samples."""
        key = frozenset((site.site.name, site.structure) for site in planned.plan.sites)
        if key not in self._errors:
            self._errors[key] = self._try(planned)
        return self._errors[key]

    def _try(self, planned: Planned) -> float:
        plan, device = planned.plan, next(self._model.parameters()).device
        importances = expecting_errors(self._importances, plan) if self._robust else self._importances
        analyses = {} if self._robust else planned.analyses

        def fit(site: PlannedSite) -> tuple[FitKey, SiteFit]:
            return self._fit(site, importances.get(site.site.name), analyses.get(site.site.name))

        numbers = itertools.count(1)

        def show(fitted: tuple[FitKey, SiteFit]) -> None:
            (name, *_), fit = fitted
            if self._on_progress is not None:
                self._on_progress(Progress("fit", name, next(numbers), len(plan.sites), fit.fitted.relative_error))

        self._last = dict(
            map_in_threads(fit, plan.sites, device=device, on_done=show, size=lambda site: site.site.num_params)
        )
        fits = {name: fit for (name, _, _), fit in self._last.items()}
        small = _sharing_copy(self._model)
        apply_(small, plan, importances=importances, fits=fits)
        error = self._squared_error(small)
        if self._found is None or error * self._margin < self._found.squared_error:
            self._best, self._found = self._last, Found(planned, fits, error)
        return error

    def _fit(
        self, planned: PlannedSite, importance: Importance | None, analysis: Analysis | None
    ) -> tuple[FitKey, SiteFit]:
        key = (planned.site.name, planned.structure, 0.0 if importance is None else importance.noise)
        known = self._last.get(key) or self._best.get(key)
        return key, known or fit_site(self._model, planned, importance, analysis)


def _squared(judge: Judge) -> Judge:
    """The square of what a judge says."""

    def squared(model: nn.Module) -> float:
        with undisturbed(model), torch.no_grad():
            said = float(judge(model))
        if not (math.isfinite(said) and said >= 0):
            raise CalibrationError(f"models are compared by how wrong they are, a number of at least 0; got {said}")
        return said**2

    return squared


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose matrices are the model's own: they are replaced, and never written to. Biases are written to."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p.dim() > 1})
