"""Auto: for each weight the best structure of every other method, those of plug-ins included.

The menu is the union of the others' menus, the analysis asks each method about its own structures, and the budget
decides, over all weights at once, which to take; a plan then names the method that was chosen. Nothing here knows how
any of them works.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, final

from torch import Tensor

from compresskit.core.decomposition import Analysis, Decomposition
from compresskit.core.importance import Importance
from compresskit.core.registry import decomposition, decompositions, register
from compresskit.core.structure import Structure
from compresskit.decompositions.svd import LowRank
from compresskit.errors import OptionError

ALL = "all"
VARIANTS: Mapping[str, Sequence[Mapping[str, str]]] = {
    "kronecker": [{"small": "both", "terms": str(terms)} for terms in (1, 2, 3, 4)],
}
"""Options of methods whose defaults leave out what the budget could choose from."""

MAX_SEARCHES = 6
"""Structures of one method that are priced with an importance if each takes a search: those that lose less, unweighted,
than all smaller ones, evenly thinned."""


SAMPLE = 3
"""Of them, as many are priced before the others are, and if each loses HOPELESS times what some other method of the
same size does, in squared error, they are all."""
HOPELESS = 1.5


class _Union:
    """The structures of all methods that an instance chooses from; the class alone names one, to be registered by."""

    def __get__(self, instance: "Auto | None", owner: type) -> tuple[type[Structure], ...]:
        if instance is None:
            return (LowRank,)
        return tuple(dict.fromkeys(kind for child in instance.children() for kind in child.structures))


@register
@final
@dataclass(frozen=True)
class Auto(Decomposition):
    """The best structure of several methods.

    Args:
        methods: names joined by `+`, as in `svd+kronecker`; `all`: every method that is registered.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "per weight the best of the other methods' structures"
    source: ClassVar[str] = "ours: one budget over the union of all menus"
    structures: ClassVar[tuple[type[Structure], ...]] = _Union()  # type: ignore[assignment]

    methods: str = ALL

    def __post_init__(self) -> None:
        if self.methods != ALL and self.name in self.methods.split("+"):
            raise OptionError("methods are those that auto chooses from; auto itself is none of them")

    def children(self) -> tuple[Decomposition, ...]:
        """The methods, each with the options that leave the most to choose from.

        Raises:
            UnknownNameError: no such method.
        """
        return _children(self._names())

    def alone(self) -> Mapping[str, Decomposition]:
        names = self._names()
        return {name: Auto(methods=name) for name in names} if len(names) > 1 else {}

    def _names(self) -> tuple[str, ...]:
        every = (name for name in decompositions() if name != self.name)
        return tuple(every if self.methods == ALL else dict.fromkeys(self.methods.split("+")))

    def fitter(self, structure: Structure) -> Decomposition:
        return next((child for child in self.children() if isinstance(structure, child.structures)), self)

    def recovers(self, structure: Structure) -> bool:
        fitter = self.fitter(structure)
        return fitter is not self and fitter.recovers(structure)

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        union: dict[Structure, None] = {}
        for child in self.children():
            union.update(dict.fromkeys(child.menu(rows, cols, lookup=lookup)))
        return union

    def analyse(self, weight: Tensor) -> Analysis:
        return _AutoAnalysis(self, weight, None)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        """Methods without a data-aware fit are left out: their structures have an infinite price."""
        return _AutoAnalysis(self, weight, importance)


@cache
def _children(names: tuple[str, ...]) -> tuple[Decomposition, ...]:
    return tuple(decomposition(name, options) for name in names for options in VARIANTS.get(name, [{}]))


@final
class _AutoAnalysis(Analysis):
    """Each method's prices of its own structures. Its analysis is dropped at once, since all of them together hold
    several times the weight, and at most one is needed again; if its prices were dear, it is shrunk."""

    def __init__(self, auto: Auto, weight: Tensor, importance: Importance | None) -> None:
        self._auto = auto
        self._weight = weight
        self._importance = None if importance is None else importance.remembering()
        self._dear: dict[Decomposition, Analysis] = {}

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        by_fitter: dict[Decomposition, list[Structure]] = {}
        for structure in structures:
            by_fitter.setdefault(self._auto.fitter(structure), []).append(structure)
        prices = dict.fromkeys(structures, math.inf)
        for fitter in sorted(by_fitter, key=lambda fitter: not fitter.prices_at_once):
            own = by_fitter[fitter]
            if self._importance is None:
                prices.update(zip(own, self._analysis(fitter).squared_errors(own), strict=True))
            elif fitter.is_data_aware():
                prices.update(self._searched(fitter, own, prices))
        self.shrink()
        return [prices[structure] for structure in structures]

    def _searched(
        self, fitter: Decomposition, structures: Sequence[Structure], others: Mapping[Structure, float]
    ) -> Mapping[Structure, float]:
        """Prices with an importance; of a method whose every price is a search, of few structures, and fewer yet if a
        sample of them is hopeless beside the prices of others."""
        analysis = self._analysis(fitter)
        worth = self._worth_a_search(fitter, structures)
        if fitter.prices_at_once:
            return dict(zip(worth, analysis.squared_errors(worth), strict=True))
        rivals = {structure: _least(others, structure) for structure in worth}

        def priced(some: Sequence[Structure]) -> list[tuple[Structure, float]]:
            found = analysis.squared_errors_beside(some, [rivals[structure] for structure in some])
            return list(zip(some, found, strict=True))

        prices = dict(priced(worth[:: max(len(worth) // SAMPLE, 1)]))
        if any(price <= HOPELESS * rivals[structure] for structure, price in prices.items()):
            prices.update(priced([structure for structure in worth if structure not in prices]))
        return prices

    def _worth_a_search(self, fitter: Decomposition, structures: Sequence[Structure]) -> Sequence[Structure]:
        """Those to price with an importance; where each is a search of its own, few that the plain prices speak for."""
        if fitter.prices_at_once or len(structures) <= MAX_SEARCHES:
            return structures
        errors = fitter.analyse(self._weight).squared_errors(structures)
        pairs = sorted(zip(errors, structures, strict=True), key=lambda pair: (pair[1].num_params, pair[0]))
        best, front = math.inf, []
        for error, structure in pairs:
            if error < best:
                best = error
                front.append(structure)
        step = max((len(front) - 1) / (MAX_SEARCHES - 1), 1.0)
        return [front[round(i * step)] for i in range(min(MAX_SEARCHES, len(front)))]

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        try:
            return self._analysis(self._auto.fitter(structure)).factors(structure)
        finally:
            self._forget()

    def shrink(self) -> None:
        self._forget()
        for analysis in self._dear.values():
            analysis.shrink()

    def _forget(self) -> None:
        if self._importance is not None:
            self._importance.forget()

    def _analysis(self, fitter: Decomposition) -> Analysis:
        """A new one; that of a method whose prices are dear is kept."""
        if fitter in self._dear:
            return self._dear[fitter]
        analysis = fitter.analyse_for(self._weight, self._importance)
        if fitter.prices_dearly:
            self._dear[fitter] = analysis
        return analysis


def _least(prices: Mapping[Structure, float], structure: Structure) -> float:
    """The lowest price of what is no larger; infinite if there is none."""
    return min((price for s, price in prices.items() if s.num_params <= structure.num_params), default=math.inf)
