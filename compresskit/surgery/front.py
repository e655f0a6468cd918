"""The front around a plan: what a little more or less size, or work if that is limited, would gain or cost."""

import math
from collections.abc import Sequence

from compresskit.errors import BudgetError
from compresskit.surgery.budget import Choice, Solution, sketch, solve
from compresskit.surgery.limits import Limits
from compresskit.surgery.plan import FrontPoint

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""What the limit is multiplied with, that of the size or, where multiply-adds or time are limited, theirs."""


def front_of(
    groups: Sequence[Sequence[Choice]], limits: Limits, *, num_params: int, scale: float
) -> tuple[FrontPoint, ...]:
    """Points around a plan, the smallest first, those that lose no less than a smaller or less busy one left out.

    Args:
        groups: the priced choices, as the budget chose from.
        num_params: of the dense model.
        scale: what the loss would be with a relative error of 1 everywhere.
    """
    points: list[FrontPoint] = []
    rest = num_params - sum(group[0].params for group in groups)  # the first choice is the dense one
    for solution in (_solution(groups, limits, factor) for factor in FACTORS):
        if solution is None:
            continue
        chosen = [group[pick] for group, pick in zip(groups, solution.picks, strict=True)]
        params = rest + sum(choice.params for choice in chosen)
        error = math.sqrt(sum(choice.loss for choice in chosen) / scale) if scale else 0.0
        macs, time_ns = sum(choice.macs for choice in chosen), sum(choice.time_ns for choice in chosen)
        if not points or error < points[-1].error:
            points.append(FrontPoint(params, num_params / params, macs, time_ns, error, solution.gap))
    return tuple(points)


def _solution(groups: Sequence[Sequence[Choice]], limits: Limits, factor: float) -> Solution | None:
    """The best choices at this multiple of the limit; None where no choice keeps it."""
    if not limits.of_work:
        return sketch(groups, max_params=round(limits.params * factor))
    max_macs, max_time_ns = (None if n is None else round(n * factor) for n in (limits.macs, limits.time_ns))
    try:
        return solve(groups, max_params=limits.params, max_macs=max_macs, max_time_ns=max_time_ns)
    except BudgetError:
        return None
