"""Searched sensitivities: what layers count, by what whole compressed models make of the samples.

The budget adds up errors of layers. What that leaves out is most where most is compressed: errors of some layers, such
as a word embedding, spoil all that comes after, and those of others hardly matter. So layers of one shape get a factor
on what their errors count; for some factors the budget is solved, everything fitted, and the compressed model run on
the samples; the factors whose model answers nearest to the dense one are taken. One shape after the other, by factors
of four and then of two; what has been priced and fitted is not priced and fitted again.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from compresskit.calibration.trials import Trials
from compresskit.surgery.pricing import OnProgress, Planned, Progress
from compresskit.surgery.sites import find_sites

STEPS = (4.0, 2.0)
"""Factors by which what a shape counts is changed, one round with each."""

PlanOf = Callable[[Mapping[str, float]], Planned]


def search_sensitivities(
    model: nn.Module,
    plan_of: PlanOf,
    trials: Trials,
    start: Mapping[str, float],
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, float]:
    """The sensitivities that do best on trial; never worse on the samples than the start. Fits are in `trials.found`.

    Args:
        plan_of: the plan for some sensitivities, by name of each site what its squared relative error counts.
        start: sensitivities of all sites.
        on_progress: called after each compressed model.
    """
    shapes: dict[object, list[str]] = {}
    for site in find_sites(model).sites:
        if site.name in start:
            shapes.setdefault((site.rows, site.cols, site.kinds), []).append(site.name)
    usual = 1 + 2 * len(STEPS) * len(shapes)

    def error_of(sensitivities: Mapping[str, float]) -> float:
        before = trials.number
        error = trials.squared_error(plan_of(sensitivities))
        if on_progress is not None and trials.number > before:
            done = trials.number
            on_progress(Progress("search", f"model {done}", done, max(done, usual), error**0.5))
        return error

    best = dict(start)
    least = error_of(best)
    for step, names in itertools.product(STEPS, shapes.values() if len(shapes) > 1 else ()):
        for factor in (step, 1 / step):
            tried = _times(best, names, factor)
            while (error := error_of(tried)) < least:
                best, least, tried = tried, error, _times(tried, names, factor)
    return best


def _times(sensitivities: Mapping[str, float], names: Sequence[str], factor: float) -> dict[str, float]:
    return {name: value * factor if name in names else value for name, value in sensitivities.items()}
