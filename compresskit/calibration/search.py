"""Searched sensitivities: what layers count, by what whole compressed models make of the samples.

The budget adds up errors of layers. What that leaves out is most where most is compressed: errors of some layers, such
as a word embedding, spoil all that comes after, and those of others hardly matter. So layers of one shape get a factor
on what their errors count; for some factors the budget is solved, everything fitted, and the compressed model run on
the samples; the factors whose model answers nearest to the dense one, or is best as a judge says, are taken. One shape
after the other, by factors of four and then of two; what has been priced and fitted is not priced and fitted again.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from compresskit.calibration.trials import Trials
from compresskit.surgery.pricing import OnProgress, Planned, Progress
from compresskit.surgery.sites import Site, find_sites

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
    """By shape, how many times as much as at the start its layers count in the best trial, where that is not once.

    Never worse on the samples than the start. Plan and fits are in `trials.found`.

    Args:
        plan_of: the plan for some sensitivities, by name of each site what its squared relative error counts.
        start: sensitivities of all sites.
        on_progress: called after each compressed model.
    """
    shapes: dict[str, list[str]] = {}
    for site in find_sites(model).sites:
        if site.name in start:
            shapes.setdefault(_shape(site), []).append(site.name)
    usual = 1 + 2 * len(STEPS) * len(shapes)

    def error_of(factors: Mapping[str, float]) -> float:
        before = trials.number
        error = trials.squared_error(plan_of(_times(start, shapes, factors)))
        if on_progress is not None and trials.number > before:
            done = trials.number
            on_progress(Progress("search", f"model {done}", done, max(done, usual), error**0.5))
        return error

    best = dict.fromkeys(shapes, 1.0)
    least = error_of(best)
    for step, shape in itertools.product(STEPS, shapes if len(shapes) > 1 else ()):
        for factor in (step, 1 / step):
            tried = {**best, shape: best[shape] * factor}
            while (error := error_of(tried)) < least:
                best, least, tried = tried, error, {**tried, shape: tried[shape] * factor}
    return {shape: factor for shape, factor in best.items() if factor != 1}


def _shape(site: Site) -> str:
    """`30522 x 384 (embedding)`."""
    return f"{site.rows} x {site.cols} ({' and '.join(sorted(set(site.kinds)))})"


def _times(
    start: Mapping[str, float], shapes: Mapping[str, Sequence[str]], factors: Mapping[str, float]
) -> dict[str, float]:
    return dict(start) | {name: start[name] * factors[shape] for shape, names in shapes.items() for name in names}
