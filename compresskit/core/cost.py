"""Cost: how long a layer is expected to take, from a description of its work and constants of one machine.

Multiply-adds alone order structures badly: a mixing by a 2 x 2 factor runs at a tenth of the rate of a wide product,
and a strided copy does no multiply-add at all. So a structure lists its operations, and a `Machine` says how long each
takes. The constants are committed, measured once on one CPU; nothing is ever timed while a model is compressed, so a
plan is the same on every machine. `python -m benchmarks run cost-model` measures the constants anew and reports how
far the prediction is from what layers take.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

TOKENS = 128
"""Tokens of the forward pass that plans are made for: one text of usual length."""
ELEMENT_BYTES = 4
"""float32, in which the constants were measured; a narrower type scales dense and factorised layers alike."""


@final
@dataclass(frozen=True)
class Gemm:
    """`batch` products of (m, k) by (k, n) in one call; in `x @ weight.T` m is the number of tokens."""

    m: int
    n: int
    k: int
    batch: int = 1

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Numbers that are read and written; a batch shares its smaller operand."""
        left, right = self.m * self.k, self.k * self.n
        shared = min(left, right) if self.batch > 1 else 0
        return self.batch * (left + right - shared + self.m * self.n) + shared


@final
@dataclass(frozen=True)
class Pass:
    """One pass over memory without a product: a copy, a sum, a lookup.

    Args:
        elements: numbers read and written.
        strided: true if neighbours in memory do not stay neighbours: a transposed copy.
    """

    elements: int
    strided: bool = False


Operation = Gemm | Pass


@final
@dataclass(frozen=True)
class Rates:
    """Speed of matrix products: `peak` for large ones, half of it where a side has the size of its `half`."""

    peak_macs_per_s: float
    half_m: float
    half_n: float
    half_k: float

    def time_s(self, gemm: Gemm) -> float:
        narrow = (1 + self.half_m / gemm.m) * (1 + self.half_n / gemm.n) * (1 + self.half_k / gemm.k)
        return gemm.macs / self.peak_macs_per_s * narrow


@final
@dataclass(frozen=True)
class Machine:
    """Constants of one machine.

    Args:
        single, batched: rates of one product and of a batch of them.
        vector: rates of a product with a vector (one token), which other routines do.
        call_s: time of an operator call that does nothing.
        gemm_bytes_per_s: memory traffic of products.
        pass_bytes_per_s, strided_bytes_per_s: of passes, and of transposed copies.
    """

    single: Rates
    batched: Rates
    vector: Rates
    call_s: float
    gemm_bytes_per_s: float
    pass_bytes_per_s: float
    strided_bytes_per_s: float

    def time_s(self, operations: Iterable[Operation]) -> float:
        """Expected time of operations that run one after the other."""
        return sum(map(self._one_s, operations))

    def _one_s(self, operation: Operation) -> float:
        num_bytes = ELEMENT_BYTES * operation.elements
        if isinstance(operation, Pass):
            rate = self.strided_bytes_per_s if operation.strided else self.pass_bytes_per_s
            return self.call_s + num_bytes / rate
        one = self.vector if operation.m == 1 else self.single
        rates = self.batched if operation.batch > 1 else one
        return self.call_s + rates.time_s(operation) + num_bytes / self.gemm_bytes_per_s


def dense_operations(rows: int, cols: int, tokens: int) -> tuple[Operation, ...]:
    """What a dense linear layer of weight (rows, cols) does."""
    return (Gemm(tokens, rows, cols),)


def dense_lookup_operations(cols: int, tokens: int) -> tuple[Operation, ...]:
    """What a dense embedding does: copy a row for each token."""
    return (Pass(2 * tokens * cols),)


MACHINE = Machine(
    single=Rates(peak_macs_per_s=113e9, half_m=15, half_n=13, half_k=11),
    batched=Rates(peak_macs_per_s=69e9, half_m=1.7, half_n=0, half_k=2.3),
    vector=Rates(peak_macs_per_s=35e9, half_m=0, half_n=0, half_k=26),
    call_s=1.9e-6,
    gemm_bytes_per_s=67e9,
    pass_bytes_per_s=168e9,
    strided_bytes_per_s=23e9,
)
"""The machine that plans are made for: two cores of an AMD EPYC of 2024, torch 2.13, float32.

The least-squares fit of the logarithms of 177 measured operations, rounded; half of them are predicted within 1.2 times
and nine of ten within 1.6 times. `peak_macs_per_s` is a limit that no size reaches: the bytes come on top of it.
"""
