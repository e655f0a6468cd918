"""Cost: how long a layer is expected to take, from a description of its work and constants of one machine.

Multiply-adds alone order structures badly: a mixing by a 2 x 2 factor runs at a tenth of the rate of a wide product,
and a strided copy does no multiply-add at all. So a structure lists its operations, and a `Machine` says how long each
takes. The constants are data (`compresskit.machines`), measured once; nothing is ever timed while a model is
compressed, so a plan for a machine is the same wherever it is made. `python -m benchmarks run cost-model` reports how
far predictions are from what layers take.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from compresskit.errors import OptionError

TOKENS = 128
"""Tokens of the forward pass that plans are made for unless another number is asked for: one text of usual length."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types of weights that a machine may compute in, and the bytes of a number."""


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
class Speeds:
    """How fast one kind of layer runs on a machine.

    Args:
        single, batched: rates of one product and of a batch of them.
        vector: rates of a product with a vector (one token), which other routines do.
        layer_s: time of a layer that does nothing.
        gemm_call_s, pass_call_s: time of a product and of a pass of next to nothing, beside the layer's.
        gemm_bytes_per_s: memory traffic of products.
        pass_bytes_per_s, strided_bytes_per_s: of passes, and of transposed copies.
        element_bytes: of a number.
    """

    single: Rates
    batched: Rates
    vector: Rates
    layer_s: float
    gemm_call_s: float
    pass_call_s: float
    gemm_bytes_per_s: float
    pass_bytes_per_s: float
    strided_bytes_per_s: float
    element_bytes: int

    def time_s(self, operations: Iterable[Operation]) -> float:
        """Expected time of a layer that does these operations one after the other."""
        return self.layer_s + sum(map(self._one_s, operations))

    def _one_s(self, operation: Operation) -> float:
        num_bytes = self.element_bytes * operation.elements
        if isinstance(operation, Pass):
            rate = self.strided_bytes_per_s if operation.strided else self.pass_bytes_per_s
            return self.pass_call_s + num_bytes / rate
        one = self.vector if operation.m == 1 else self.single
        rates = self.batched if operation.batch > 1 else one
        return self.gemm_call_s + rates.time_s(operation) + num_bytes / self.gemm_bytes_per_s


@final
@dataclass(frozen=True)
class Machine:
    """What layers are expected to take somewhere.

    Args:
        name: one word.
        about: what was measured: processor, software, kernels.
        dtype: type of weights and inputs, of `ELEMENT_BYTES`.
        notable_s: a layer that is expected to take so much longer than dense, or less, counts as equally fast.
        tiny_s: so does one whose dense layer takes no more than this: most of that is the call, not the work.
        dense: speeds of dense layers.
        factorised: of factorised ones, but for those in
        kinds: pairs of a `Structure.kind` and its speeds.
    """

    name: str
    about: str
    dtype: str
    notable_s: float
    tiny_s: float
    dense: Speeds
    factorised: Speeds
    kinds: tuple[tuple[str, Speeds], ...] = ()

    def __hash__(self) -> int:  # of a few hundred numbers, asked for with each structure of each menu
        return hash((self.name, self.about, self.dense.gemm_call_s))

    def speeds(self, kind: str | None) -> Speeds:
        """Of layers whose structure is of this kind; None: of dense ones."""
        return self.dense if kind is None else dict(self.kinds).get(kind, self.factorised)

    def is_slower(self, layer_s: float, dense_s: float) -> bool:
        """Whether a layer of this time counts as slower than the dense one."""
        return layer_s - dense_s > self.notable_s and dense_s > self.tiny_s


@final
@dataclass(frozen=True)
class Target:
    """What plans are made for: so many tokens at a time on a machine.

    Raises:
        OptionError: tokens are not at least 1.
    """

    machine: Machine
    tokens: int = TOKENS

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError(f"tokens are those that the model sees at a time, at least 1; got {self.tokens}")

    def __str__(self) -> str:
        number = "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        return f"{number} on {self.machine.name}: {self.machine.about}"


def dense_operations(rows: int, cols: int, tokens: int) -> tuple[Operation, ...]:
    """What a dense linear layer of weight (rows, cols) does."""
    return (Gemm(tokens, rows, cols),)


def dense_lookup_operations(cols: int, tokens: int) -> tuple[Operation, ...]:
    """What a dense embedding does: copy a row for each token."""
    return (Pass(2 * tokens * cols),)
