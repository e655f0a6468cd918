"""The budget: one choice per group of sites so that the loss is least and the size is kept.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11): Lagrangian
bound, then a dynamic program over what the bound leaves open. The gap to the optimum is proven and reported.
`scipy.optimize.milp` was tried first: up to a minute where many sites offer the same few sizes, and HiGHS then
writes to the standard output, which `--json` needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from compresskit.errors import BudgetError

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.intp]

STEPS = 200_000
"""Resolution of the dynamic program: sizes are rounded up to this share of the budget."""
BISECTIONS = 60
MACS_BISECTIONS = 20
MAX_PRICE = 1e30


@final
@dataclass(frozen=True)
class Choice:
    """One way to store a group of sites: what it costs and what it loses."""

    params: int
    macs: int
    loss: float


@final
@dataclass(frozen=True)
class Solution:
    """Index of the choice of each group, and the proven relative gap between its loss and the optimum."""

    picks: tuple[int, ...]
    gap: float


def param_budget(
    total: int, *, ratio: float | None = None, params: int | None = None, keep: float | None = None
) -> int:
    """Most parameters that the compressed model may have; give exactly one of ratio, params and keep.

    Args:
        total: parameters of the dense model, tied ones once.
        ratio: original / compressed, at least 1.
        params: a number of parameters.
        keep: compressed / original, above 0 and at most 1.

    Raises:
        BudgetError: none or several are given, or the value makes no sense.
    """
    given = {name: v for name, v in (("ratio", ratio), ("params", params), ("keep", keep)) if v is not None}
    if len(given) != 1:
        raise BudgetError(f"give exactly one of ratio, params and keep; got {', '.join(given) or 'none'}")
    if ratio is not None:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise BudgetError(f"ratio is original / compressed parameters, a number of at least 1; got {ratio:g}")
        return math.floor(total / ratio)
    if keep is not None:
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise BudgetError(f"keep is the share of the parameters that is kept, above 0 and at most 1; got {keep:g}")
        return math.floor(total * keep)
    assert params is not None
    if not 0 < params <= total:
        raise BudgetError(f"params is 1 to {total:,}, the model's own number; got {params:,}")
    return params


def solve(groups: Sequence[Sequence[Choice]], *, max_params: int, max_macs: int | None = None) -> Solution:
    """The choices with the least total loss that keep both limits.

    Args:
        groups: what each group of sites may become; one choice of each is picked.
        max_params: limit of the sum of parameters.
        max_macs: limit of the sum of multiply-adds, or None.

    Raises:
        BudgetError: no combination keeps the limits; says how far the nearest one is.
    """
    least = sum(min(choice.params for choice in group) for group in groups)
    if least > max_params:
        raise BudgetError(
            f"the smallest structures take {least:,} parameters together, {max_params:,} are left for them"
        )
    table = _Table.of(groups)
    picks, bound = _knapsack(table, table.loss, max_params)
    if max_macs is not None and _total(table.macs, picks) > max_macs:
        picks, bound = _limit_macs(table, max_params, max_macs)
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    loss = sum(choice.loss for choice in chosen)
    assert sum(choice.params for choice in chosen) <= max_params
    return Solution(tuple(int(pick) for pick in picks), max(loss - bound, 0.0) / loss if loss > 0 else 0.0)


@final
@dataclass(frozen=True)
class _Table:
    """The choices as arrays (groups, most choices of a group), filled up with infinitely bad ones."""

    params: Array
    macs: Array
    loss: Array

    @staticmethod
    def of(groups: Sequence[Sequence[Choice]]) -> "_Table":
        width = max(len(group) for group in groups)

        def array(attribute: str) -> Array:
            rows = [[float(getattr(choice, attribute)) for choice in group] for group in groups]
            return np.array([row + [math.inf] * (width - len(row)) for row in rows])

        return _Table(array("params"), array("macs"), array("loss"))


def _total(values: Array, picks: Picks) -> float:
    return float(values[np.arange(len(picks)), picks].sum())


def _knapsack(table: _Table, loss: Array, limit: int) -> tuple[Picks, float]:
    """Picks with least `loss` and at most `limit` parameters, and a lower bound of that loss.

    The Lagrangian bound says which choices can be in an optimal solution at all; the few that are left go through a
    dynamic program over the budget.
    """
    price = _price_of_params(table.params, loss, limit)
    reduced = loss + price * np.where(np.isfinite(table.params), table.params, 0.0)
    best = reduced.min(axis=1, keepdims=True)
    bound = float(best.sum() - price * limit)
    picks = _fill(table.params, loss, _feasible_start(table.params, reduced), limit)
    possible = reduced - best <= _total(loss, picks) - bound + 1e-9 * abs(bound)
    better = _fill(table.params, loss, _dynamic_program(table.params, loss, possible, picks, limit), limit)
    return min(picks, better, key=lambda p: _total(loss, p)), bound


def _price_of_params(params: Array, loss: Array, limit: int) -> float:
    """The smallest price per parameter at which the cheapest choices keep the limit, by bisection."""
    sizes = np.where(np.isfinite(params), params, 0.0)

    def used(price: float) -> float:
        return _total(sizes, (loss + price * sizes).argmin(axis=1))

    if used(0.0) <= limit:
        return 0.0
    high = 1e-12
    while used(high) > limit and high < MAX_PRICE:
        high *= 4
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= limit else (middle, high)
    return high


def _feasible_start(params: Array, reduced: Array) -> Picks:
    """The cheapest choice of each group; of equally cheap ones the smallest."""
    cheapest = reduced <= reduced.min(axis=1, keepdims=True) * (1 + 1e-12)
    picks: Picks = np.where(cheapest, params, math.inf).argmin(axis=1)
    return picks


def _fill(params: Array, loss: Array, picks: Picks, limit: int) -> Picks:
    """Spend what is left of the budget on single exchanges, the best gain first, until none fits."""
    picks = picks.copy()
    rows = np.arange(len(picks))
    while True:
        free = limit - _total(params, picks)
        if free < 0:  # the start does not fit yet: the smallest choice of every group does
            picks = params.argmin(axis=1)
            continue
        gain = loss[rows, picks][:, None] - loss
        fits = params - params[rows, picks][:, None] <= free
        gain = np.where(fits, gain, -math.inf)
        group, choice = np.unravel_index(gain.argmax(), gain.shape)
        if not gain[group, choice] > 0:
            return picks
        picks[group] = choice


def _dynamic_program(params: Array, loss: Array, possible: Array, fallback: Picks, limit: int) -> Picks:
    """Best picks among the possible ones, sizes rounded up to 1 / STEPS of the limit, so that they always fit."""
    unit = max(limit / STEPS, 1.0)
    steps = int(limit / unit)
    best = np.zeros(steps + 1)  # least loss of the groups so far within each budget
    trail: list[tuple[Picks, Picks]] = []
    for g in range(len(params)):
        candidates = np.flatnonzero(possible[g])
        units = np.ceil(params[g, candidates] / unit).astype(int)
        after = np.full(steps + 1, math.inf)
        pick = np.zeros(steps + 1, dtype=np.int16)
        for i, (candidate, used) in enumerate(zip(candidates, units, strict=True)):
            if used <= steps:
                total = best[: steps + 1 - used] + loss[g, candidate]
                wins = total < after[used:]
                after[used:][wins] = total[wins]
                pick[used:][wins] = i
        trail.append((candidates[pick], units[pick]))
        best = after
    if not np.isfinite(best[steps]):
        return fallback  # rounding up made a tight budget infeasible; the exchanges have already filled it
    picks, at = np.zeros(len(params), dtype=int), steps
    for g in reversed(range(len(params))):
        choices, units = trail[g]
        picks[g] = choices[at]
        at -= units[at]
    return picks


def _limit_macs(table: _Table, max_params: int, max_macs: int) -> tuple[Picks, float]:
    """A second limit through its own price, found by bisection; the bound stays a bound."""
    macs = np.where(np.isfinite(table.macs), table.macs, 0.0)

    def at(price: float) -> tuple[Picks, float]:
        picks, bound = _knapsack(table, table.loss + price * macs, max_params)
        return picks, bound - price * max_macs

    low, high = 0.0, float(table.loss[np.isfinite(table.loss)].max() / max_macs) or 1.0
    for _ in range(BISECTIONS):
        if _total(macs, at(high)[0]) <= max_macs:
            break
        high *= 4
    else:
        fewest = _total(macs, at(high)[0])
        raise BudgetError(
            f"{max_macs:,} multiply-adds per token cannot be kept with {max_params:,} parameters; "
            f"these rules reach {fewest:,.0f}"
        )
    picks, bound = at(high)
    for _ in range(MACS_BISECTIONS):
        middle = (low + high) / 2
        trial, trial_bound = at(middle)
        bound = max(bound, trial_bound)
        if _total(macs, trial) <= max_macs:
            high = middle
            picks = min(picks, trial, key=lambda p: _total(table.loss, p))
        else:
            low = middle
    return picks, bound
