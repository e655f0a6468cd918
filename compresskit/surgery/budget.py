"""The budget: one choice per group of sites so that the loss is least and the size is kept.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11): Lagrangian
bound, then a dynamic program over what the bound leaves open. The gap to the optimum is proven and reported.
`scipy.optimize.milp` was tried first: up to a minute where many sites offer the same few sizes, and HiGHS then
writes to the standard output, which `--json` needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from compresskit.errors import BudgetError

Array = npt.NDArray[np.float64]
Picks = npt.NDArray[np.intp]
Limits = Sequence[tuple[Array, int]]

STEPS = 50_000
"""Resolution of the dynamic program: sizes are rounded up to this share of the budget."""
BISECTIONS = 60
PRICE_BISECTIONS = 40
PRICE_ROUNDS = 3
"""Rounds in which two further limits find their prices in turn."""
LOWEST_PRICE = 1e-12
"""Prices are sought from this share of the largest loss per unit upwards."""
ROUNDING = 1e-12
"""Share of the numbers that a bound is computed from by which it is lowered, so that rounding cannot make it false."""


@final
class TimeLimitError(BudgetError):
    """The limit of time cannot be kept: the least that can, for whoever knows what it means as a speed-up."""

    def __init__(self, max_time_ns: int, least_time_ns: float) -> None:
        super().__init__(f"{max_time_ns:,} ns cannot be kept; these rules reach {least_time_ns:,.0f} ns")
        self.least_time_ns = least_time_ns


@final
@dataclass(frozen=True)
class Choice:
    """One way to store a group of sites: what it costs and what it loses; `time_ns` is predicted, not measured."""

    params: int
    macs: int
    loss: float
    time_ns: int = 0


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


def solve(
    groups: Sequence[Sequence[Choice]],
    *,
    max_params: int,
    max_macs: int | None = None,
    max_time_ns: int | None = None,
) -> Solution:
    """The choices with the least total loss that keep all limits.

    Args:
        groups: what each group of sites may become; one choice of each is picked.
        max_params: limit of the sum of parameters.
        max_macs, max_time_ns: limits of the sums of multiply-adds and of predicted times, or None.

    Raises:
        BudgetError: no combination keeps the limits; says how far the nearest one is.
        TimeLimitError: what keeps it from doing so is the time.
    """
    least = sum(min(choice.params for choice in group) for group in groups)
    if least > max_params:
        raise BudgetError(
            f"the smallest structures take {least:,} parameters together, {max_params:,} are left for them"
        )
    table = _Table.of(groups)
    picks, bound = _knapsack(table.loss, table.params, max_params)
    further = [(table.macs, max_macs), (table.time_ns, max_time_ns)]
    limits = [(sizes, limit) for sizes, limit in further if limit is not None]
    if not _keeps(picks, limits):
        _refuse_impossible(table, max_params, max_macs, max_time_ns)
        picks, bound = _limit(table, max_params, limits, bound)
    return _solution(table, picks, bound)


def sketch(groups: Sequence[Sequence[Choice]], *, max_params: int) -> Solution | None:
    """Good choices within a limit of parameters from the Lagrangian bound alone, in milliseconds; None if none fit."""
    table = _Table.of(groups)
    if _total(table.params, table.params.argmin(axis=1)) > max_params:
        return None
    picks, bound, _ = _relax(table.loss, table.params, max_params)
    return _solution(table, picks, bound)


def _solution(table: "_Table", picks: Picks, bound: float) -> Solution:
    loss = _total(table.loss, picks)
    return Solution(tuple(int(pick) for pick in picks), max(loss - bound, 0.0) / loss if loss > 0 else 0.0)


@final
@dataclass(frozen=True)
class _Table:
    """The choices as arrays (groups, most choices of a group), filled up with infinitely bad ones."""

    params: Array
    macs: Array
    loss: Array
    time_ns: Array

    @staticmethod
    def of(groups: Sequence[Sequence[Choice]]) -> "_Table":
        width = max(len(group) for group in groups)

        def array(attribute: str) -> Array:
            rows = [[float(getattr(choice, attribute)) for choice in group] for group in groups]
            return np.array([row + [math.inf] * (width - len(row)) for row in rows])

        return _Table(array("params"), array("macs"), array("loss"), array("time_ns"))


def _total(values: Array, picks: Picks) -> float:
    return float(values[np.arange(len(picks)), picks].sum())


def _knapsack(loss: Array, params: Array, limit: int) -> tuple[Picks, float]:
    """Picks with least `loss` and at most `limit` parameters, and a lower bound of that loss.

    The Lagrangian bound says which choices can be in an optimal solution at all; the few that are left go through a
    dynamic program over the budget.
    """
    picks, bound, excess = _relax(loss, params, limit)
    possible = (excess <= _total(loss, picks) - bound) & _undominated(loss, params)
    better = _dynamic_program(loss, params, possible, limit)
    if better is None:
        return picks, bound
    return min(picks, _fill(loss, better, [(params, limit)]), key=lambda p: _total(loss, p)), bound


def _relax(loss: Array, params: Array, limit: int) -> tuple[Picks, float, Array]:
    """Good picks, a lower bound, and by how much the loss exceeds the bound at least if a choice is taken."""
    price = _price_of_params(loss, params, limit)
    reduced = loss + price * np.where(np.isfinite(params), params, 0.0)
    best = reduced.min(axis=1, keepdims=True)
    rounding = ROUNDING * (float(best.sum()) + price * limit)
    bound = max(float(best.sum()) - price * limit - rounding, float(loss.min(axis=1).sum()) * (1 - ROUNDING))
    picks: Picks = np.where(reduced <= best * (1 + ROUNDING), params, math.inf).argmin(axis=1)
    if _total(params, picks) > limit:
        picks = params.argmin(axis=1)
    return _fill(loss, picks, [(params, limit)]), bound, reduced - best - 2 * rounding


def _price_of_params(loss: Array, params: Array, limit: int) -> float:
    """The smallest price per parameter at which the cheapest choices keep the limit, by bisection."""
    sizes = np.where(np.isfinite(params), params, 0.0)
    top = _largest(loss)

    def used(price: float) -> float:
        return _total(sizes, (loss + price * sizes).argmin(axis=1))

    if used(0.0) <= limit:
        return 0.0
    low, high = 0.0, LOWEST_PRICE * top
    while used(high) > limit and high < top:
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= limit else (middle, high)
    return high


def _largest(loss: Array) -> float:
    return float(loss[np.isfinite(loss)].max())


def _fill(loss: Array, picks: Picks, limits: Limits) -> Picks:
    """Spend what is left of the limits on single exchanges, the best gain first, until none fits."""
    picks = picks.copy()
    rows = np.arange(len(picks))
    while True:
        gain = loss[rows, picks][:, None] - loss
        for sizes, limit in limits:
            gain[sizes - sizes[rows, picks][:, None] > limit - _total(sizes, picks)] = -math.inf
        group, choice = np.unravel_index(gain.argmax(), gain.shape)
        if not gain[group, choice] > 0:
            return picks
        picks[group] = choice


def _undominated(loss: Array, params: Array) -> npt.NDArray[np.bool_]:
    """True for choices that lose less than all smaller ones of their group."""
    order = np.lexsort((loss, params), axis=1)
    least = np.minimum.accumulate(np.take_along_axis(loss, order, axis=1), axis=1)
    better = np.ones(loss.shape, dtype=bool)
    better[:, 1:] = least[:, 1:] < least[:, :-1]
    result = np.empty_like(better)
    np.put_along_axis(result, order, better, axis=1)
    return result


def _dynamic_program(loss: Array, params: Array, possible: npt.NDArray[np.bool_], limit: int) -> Picks | None:
    """Best picks among the possible ones, sizes rounded up to 1 / STEPS of the limit, so that they always fit.

    None if a tight budget leaves no room for the rounding.
    """
    unit = max(limit / STEPS, 1.0)
    steps = int(limit / unit)
    best = np.zeros(steps + 1)  # least loss of the groups so far within each budget
    trail: list[tuple[Picks, Picks, npt.NDArray[np.unsignedinteger]]] = []
    for g in range(len(params)):
        candidates = np.flatnonzero(possible[g])
        units = np.ceil(params[g, candidates] / unit).astype(np.intp)
        after = np.full(steps + 1, math.inf)
        pick = np.zeros(steps + 1, dtype=np.min_scalar_type(len(candidates)))
        for i in np.flatnonzero(units <= steps):
            used = units[i]
            total = best[: steps + 1 - used] + loss[g, candidates[i]]
            wins = total < after[used:]
            np.copyto(after[used:], total, where=wins)
            np.copyto(pick[used:], i, where=wins, casting="unsafe")
        trail.append((candidates, units, pick))
        best = after
    if not np.isfinite(best[steps]):
        return None
    picks, at = np.zeros(len(params), dtype=np.intp), steps
    for g in reversed(range(len(params))):
        candidates, units, pick = trail[g]
        picks[g] = candidates[pick[at]]
        at -= units[pick[at]]
    return picks


def _keeps(picks: Picks, limits: Limits) -> bool:
    return all(_total(sizes, picks) <= limit for sizes, limit in limits)


def least_time_ns(groups: Sequence[Sequence[Choice]], max_params: int) -> float:
    """The least total time of choices that keep the limit of parameters, infinity if none does."""
    table = _Table.of(groups)
    picks = _knapsack(table.time_ns, table.params, max_params)[0]
    return _total(table.time_ns, picks) if _total(table.params, picks) <= max_params else math.inf


def _refuse_impossible(table: _Table, max_params: int, max_macs: int | None, max_time_ns: int | None) -> None:
    """Raise BudgetError if one of the further limits cannot be kept beside that of the parameters."""
    fewest = _total(table.macs, _knapsack(table.macs, table.params, max_params)[0])
    if max_macs is not None and fewest > max_macs:
        raise BudgetError(
            f"{max_macs:,} multiply-adds per token cannot be kept with {max_params:,} parameters; "
            f"these rules reach {fewest:,.0f}"
        )
    least = _total(table.time_ns, _knapsack(table.time_ns, table.params, max_params)[0])
    if max_time_ns is not None and least > max_time_ns:
        raise TimeLimitError(max_time_ns, least)


def _limit(table: _Table, max_params: int, limits: Limits, bound: float) -> tuple[Picks, float]:
    """Further limits through prices of their own, found by bisection; each price gives a bound, the highest counts."""
    every: Limits = [(table.params, max_params), *limits]
    finite = [np.where(np.isfinite(sizes), sizes, 0.0) for sizes, _ in limits]
    search = _Prices(table, max_params, limits, finite, bound)
    shares = sum(sizes / max(limit, 1) for sizes, limit in limits)
    assert isinstance(shares, np.ndarray)
    search.found += [
        _fill(table.loss, picks, every)
        for sizes in (*(sizes for sizes, _ in limits), shares)
        if _keeps(picks := _knapsack(sizes, table.params, max_params)[0], limits)
    ]
    prices = [0.0] * len(limits)
    for _ in range(PRICE_ROUNDS if len(limits) > 1 else 1):
        for i in range(len(limits)):
            prices[i] = search.price(i, prices)
    last = _knapsack(search.priced(prices), table.params, max_params)[0]
    if _keeps(last, limits):
        search.found.append(last)
    if not search.found:
        asked = " and ".join(f"{limit:,}" for _, limit in limits)
        raise BudgetError(
            f"no plan was found that keeps {max_params:,} parameters, multiply-adds and time (limits {asked}), "
            "although each can be kept alone; relax one of them"
        )
    best = min(search.found, key=lambda p: _total(table.loss, p))
    return _fill(table.loss, best, every), search.bound


@dataclass
class _Prices:
    """The search for prices of further limits: what was found on the way, and the highest bound."""

    table: _Table
    max_params: int
    limits: Limits
    finite: Sequence[Array]
    bound: float
    found: list[Picks] = field(default_factory=list)

    def priced(self, prices: Sequence[float]) -> Array:
        """The losses with what each choice takes of the limits."""
        losses = self.table.loss
        for price, sizes in zip(prices, self.finite, strict=True):
            losses = losses + price * sizes
        return losses

    def price(self, i: int, prices: Sequence[float]) -> float:
        """About the smallest price of limit i at which the cheapest choices keep it, the other prices being fixed."""
        top = _largest(self.table.loss)
        low, high = 0.0, LOWEST_PRICE * top
        if len(self.limits) > 1 and self._try(i, prices, 0.0):
            return 0.0
        while not self._try(i, prices, high) and high < top:
            low, high = high, high * 4
        for _ in range(PRICE_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._try(i, prices, middle) else (middle, high)
        return high

    def _try(self, i: int, prices: Sequence[float], price: float) -> bool:
        """Whether the cheapest choices at this price keep limit i; notes them and their bound."""
        prices = [price if j == i else other for j, other in enumerate(prices)]
        trial, bound, _ = _relax(self.priced(prices), self.table.params, self.max_params)
        paid = sum(price * limit for price, (_, limit) in zip(prices, self.limits, strict=True))
        self.bound = max(self.bound, bound - paid - ROUNDING * (bound + paid))
        if _keeps(trial, self.limits):
            self.found.append(trial)
        sizes, limit = self.limits[i]
        return _total(sizes, trial) <= limit
