"""A plan that chooses between methods, compared with plans that take one of them alone, by what whole models answer.

The budget adds up errors of layers, and plans that lose the same by that sum may answer differently: measured on
MiniLM, a plan with the least sum of all answered up to 4 % further from the dense model than one of BLAST alone.
"""

from collections.abc import Mapping

from compresskit.calibration.trials import Trials
from compresskit.surgery.pricing import OnProgress, Planned, Progress

TOGETHER = "together"
"""What the plan that chooses is called among its rivals."""
MARGIN = 1.035
"""Squared errors of answers that differ less do not order models by what they are used for (STS-B, MiniLM): the plan
with the smaller sum of errors of layers stays."""


def compare_plans(
    trials: Trials, planned: Planned, rivals: Mapping[str, Planned], *, on_progress: OnProgress | None = None
) -> dict[str, float]:
    """Relative errors of the answers of each model on the samples, by name; first that of the plan in `trials.found`.

    With trials of this `MARGIN` that is the given one, unless a rival's model answers notably nearer. With trials by a
    judge: how wrong it says that each is.

    Args:
        planned: the plan to compare.
        rivals: by name, from `rivals_of`.
        on_progress: called after each model.
    """
    errors: dict[str, float] = {}
    plans = {TOGETHER: planned, **rivals}
    for name, plan in plans.items():
        errors[name] = trials.squared_error(plan) ** 0.5
        if on_progress is not None:
            on_progress(Progress("rivals", name, len(errors), len(plans), errors[name]))
    taken = next(name for name, plan in plans.items() if plan is trials.found.planned)
    return {taken: errors[taken], **errors}
