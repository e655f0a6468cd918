"""What alternating fits of a weight gain over their starts, at all ranks, from short fits at a few.

A full fit of every rank of a menu would take hours. But the share of the squared error that is left is a smooth
function of the rank, and a few rounds tell about what many give.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import final

ANCHORS = (0.1, 0.2, 0.4, 0.8, 1)
"""Shares of the highest rank that are fitted for prices, if ranks beside them are asked for. What is gained over the
start is near a power of the rank, and so it is interpolated between them, and continued below."""
FEW_RANKS = 32
"""Up to so many ranks of a weight are all fitted, in full: such fits are fast, and small weights differ from rank to
rank."""
CAUTION = 0.12
"""Four times the share of the gain that is not counted midway between anchors: a price must not be too low."""
LEAST_GAIN = 1e-6
"""What counts as none, as a share of the squared error, and as all but this share."""
SHORT_ROUNDS = 5
"""Rounds of a short fit. Weighted by the inputs of layers of all-MiniLM-L6-v2 and of random ones of bert-base shapes,
what a fit gains, minus the logarithm of the share that is left, was then 0.72 to 0.81 of that after FULL_ROUNDS at a
tenth of the highest rank, 0.45 to 0.65 at a quarter, 0.35 to 0.57 at half. Without weights of inputs, as in embeddings,
it was 0.23 to 0.35: too little to tell."""
LOW = 0.25
"""Up to this share of the highest rank the last short round hardly ever pays, and is left out."""
FULL_ROUNDS = 15
GROWTH, GROWTH_POWER = 2.4, 0.3
"""What is gained after FULL_ROUNDS / after SHORT_ROUNDS is expected to be GROWTH * (rank / highest) ** GROWTH_POWER, at
least 1. Where it is less, the fit takes some rounds more to keep its price."""


@final
@dataclass(frozen=True)
class Gains:
    """Shares of the squared error of the start that is expected to be left at each rank.

    Args:
        top: the highest rank.
        rounds: of a fit.
        short: whether short fits tell enough.
        at: the share at this rank after so many rounds, 0 to 1.
    """

    top: int
    rounds: int
    short: bool
    at: Callable[[int, int], float]

    def share(self, rank: int) -> float:
        """Of this rank, 0 to 1; its logarithm is a power of the rank between two anchors."""
        if rank > self.top or self.top <= FEW_RANKS or self.rounds == 0:
            return self.at(rank, self.rounds)
        anchors = sorted({max(1, round(share * self.top)) for share in ANCHORS})
        if rank in anchors:
            return exp(-self._gain(rank))
        above = min(max(bisect_left(anchors, rank), 1), len(anchors) - 1)
        ranks = anchors[above - 1 : above + 1]
        low, high = (log(self._gain(anchor)) for anchor in ranks)
        share = log(rank / ranks[0]) / log(ranks[1] / ranks[0])
        caution = 1 - CAUTION * max(share * (1 - share), 0.0)
        return exp(-caution * exp(low + share * (high - low)))

    def _gain(self, rank: int) -> float:
        """Minus the logarithm of the share that is expected to be left at an anchor."""
        short = SHORT_ROUNDS - 1 if rank <= LOW * self.top else SHORT_ROUNDS
        rounds = min(self.rounds, short) if self.short else self.rounds
        gain = max(-log(max(self.at(rank, rounds), LEAST_GAIN)), LEAST_GAIN)
        growth: float = max(GROWTH * (rank / self.top) ** GROWTH_POWER, 1.0)
        return gain * (1 + (growth - 1) * min((self.rounds - rounds) / (FULL_ROUNDS - SHORT_ROUNDS), 1.0))
