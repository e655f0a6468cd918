"""Sizes and storage of the factors of a Kronecker sum."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

from compresskit.core.native import WIDEST_TRAINED, Native, Plan, first_axis, last_axis, swap

MOST_TRAINED = 300_000
"""Numbers of the wide factors of all terms up to which the compiled kernel trains a layer of at most `WIDEST_TRAINED`
inputs: steps take .5 to 1.06 times as long as by PyTorch."""
MOST_TRAINED_HALF, WIDE_TRAINED_HALF = 2**19, 150_000
"""Likewise in bfloat16, of at most so many inputs and of more: .4 to 1.1 times, wider ones .6 to 1.2."""


@final
@dataclass(frozen=True)
class KronForm:
    """Sizes and storage of sum_k small_k (x) wide_k, small_k (p, q) and wide_k (r, s).

    Args:
        wide_first: multiply by wide, then mix: small (p, q * terms), wide (terms * r, s). Else mix first:
            small (p * terms, q), wide (r, terms * s).
        small_left: whether the small factor stands on the left of the product.
        rows: outputs that are kept of p * r.
    """

    p: int
    q: int
    r: int
    s: int
    terms: int
    wide_first: bool
    small_left: bool
    rows: int

    @property
    def cols(self) -> int:
        return self.q * self.s

    @property
    def between(self) -> int:
        """Numbers that lie between the two products, for each token."""
        return self.terms * (self.q * self.r if self.wide_first else self.p * self.s)

    @cached_property
    def native(self) -> Native:
        """The product (..., cols) -> (..., p * r) for the compiled kernel.

        With one term factors are stored alike for both orders. On the way back the order that mixes the input spares a
        wide product where p <= q: what is mixed is cheap to have again.
        """
        plan, factors = self._ordered(self.wide_first)
        numbers, narrow = self.terms * self.r * self.s, self.cols <= WIDEST_TRAINED
        trains = numbers <= MOST_TRAINED and narrow
        trains_half = numbers < (MOST_TRAINED_HALF if narrow else WIDE_TRAINED_HALF)
        if self.terms > 1:
            return Native(plan, factors, trains=trains, trains_half=trains_half)
        back, half = (self._ordered(self.p > self.q, pairs=pairs) for pairs in (False, True))
        return Native(plan, factors, *back, half_backward=half[0], trains=trains, trains_half=trains_half)

    def _ordered(self, wide_first: bool, *, pairs: bool = False) -> tuple[Plan, tuple[str, str]]:
        p, q, r, s, k = self.p, self.q, self.r, self.s, self.terms
        if wide_first:
            products, factors = (*last_axis(q, s, k * r), *first_axis(q * k, p, r)), ("wide", "small")
        elif p * k == 1 and not self.small_left and not pairs:
            return (*last_axis(s, q, 1), *last_axis(1, s, r)), ("small", "wide")  # nothing to swap
        else:
            products, factors = (*first_axis(q, p * k, s), *last_axis(p, k * s, r)), ("small", "wide")
        return products if self.small_left else (*swap(s, q), *products, *swap(p, r)), factors


def are_sizes(side: object) -> bool:
    """Whether this is the shape of a factor: two integers, at least 1."""
    return isinstance(side, tuple) and len(side) == 2 and all(isinstance(size, int) and size >= 1 for size in side)
