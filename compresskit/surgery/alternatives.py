"""What each method could do for a site at each size: what a choice was made from, and why it fell as it did."""

import bisect
from collections.abc import Mapping, Sequence

from compresskit.core.decomposition import Decomposition
from compresskit.core.structure import Structure

Front = Sequence[tuple[int, float]]
"""Parameters and squared relative error, the one rising and the other falling."""
Fronts = Mapping[str, Front]
"""By name of the method."""


def undominated(sizes: Sequence[int], errors: Sequence[float]) -> list[int]:
    """Indices of what loses less than everything that is no larger, the smallest first."""
    kept: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], errors[i])):
        if not kept or errors[i] < errors[kept[-1]]:
            kept.append(i)
    return kept


def fronts_of(decomposition: Decomposition, structures: Sequence[Structure], errors: Sequence[float]) -> Fronts:
    """The front of each method that a decomposition chooses from; empty for one that chooses from no other."""
    names = [decomposition.fitter(structure).name for structure in structures]
    if set(names) <= {decomposition.name}:
        return {}
    fronts = {}
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        sizes = [structures[i].num_params for i in own]
        kept = undominated(sizes, [errors[i] for i in own])
        fronts[name] = [(sizes[i], errors[own[i]]) for i in kept if errors[own[i]] < float("inf")]
    return fronts


def best_within(fronts: Fronts, max_params: int) -> tuple[tuple[str, float], ...]:
    """Each method's least relative error with at most so many parameters, the best method first."""
    found = []
    for name, front in fronts.items():
        at = bisect.bisect_right(front, max_params, key=lambda point: point[0])
        if at:
            found.append((name, max(front[at - 1][1], 0.0) ** 0.5))
    return tuple(sorted(found, key=lambda pair: pair[1]))
