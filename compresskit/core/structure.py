"""Structure: the sizes of a factorisation, and the arithmetic that its factors stand for.

A structure holds integers only; the factors are passed in. So a structure is a value: it can be
compared, hashed, priced, written as JSON and sent elsewhere without any tensor.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.native import Native
from compresskit.errors import StructureError

Factor = Tensor | nn.Module
"""A factor as `matmul` gets it: a tensor, or the module that holds one as its `weight` (nn.Linear)."""


@final
@dataclass(frozen=True)
class TensorSpec:
    """Shape of one stored factor.

    Args:
        shape: sizes of the tensor.
        matrix: true if `matmul` only ever uses it as `x @ factor.T`; it is then held by an `nn.Linear` child,
            where PEFT and torchao find it.
    """

    shape: tuple[int, ...]
    matrix: bool = False

    def __post_init__(self) -> None:
        if self.matrix and len(self.shape) != 2:
            raise StructureError(f"a factor that acts as a matrix has 2 dimensions, this one has shape {self.shape}")

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)


def tensor_of(factor: Factor) -> Tensor:
    """The tensor that a factor stands for."""
    return factor if isinstance(factor, Tensor) else factor.weight  # type: ignore[return-value]


def plain_matrix(factor: Factor) -> Tensor | None:
    """The tensor of a factor that does no more than multiply by it; None for one that has to be called.

    A child module that is more than a bare `nn.Linear` (a LoRA layer, hooks, a quantized weight) is called, not
    bypassed; accelerate puts a forward on the instance, which fetches offloaded weights.
    """
    if isinstance(factor, nn.Module):
        bare = type(factor) is nn.Linear and not (factor._forward_hooks or factor._forward_pre_hooks)
        if not bare or "forward" in vars(factor):
            return None
        matrix: Tensor | None = factor._parameters.get("weight")  # half a microsecond less than factor.weight
    else:
        matrix = factor
    return matrix if type(matrix) in (Tensor, nn.Parameter) else None


def linear(x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
    """`x @ factor.T + bias`, x (..., in), factor (out, in), whatever kind of factor it is."""
    weight = factor if isinstance(factor, Tensor) else plain_matrix(factor)
    if weight is not None:
        return F.linear(x, weight, bias)
    assert isinstance(factor, nn.Module)
    y: Tensor = factor(x)
    return y if bias is None else y + bias.to(y.dtype)  # under autocast y is narrower


@dataclass(frozen=True)
class Structure(ABC):
    """Sizes of one factorisation of a weight W (rows, cols); subclasses are frozen dataclasses of ints and tuples."""

    kind: ClassVar[str]
    """Name in checkpoints and plans; never reused for another layout."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise StructureError(f"{self.kind}: a weight of {self.rows} x {self.cols} does not exist")
        self.validate()

    @abstractmethod
    def validate(self) -> None:
        """Raise StructureError if the sizes contradict each other."""

    @abstractmethod
    def factor_specs(self) -> dict[str, TensorSpec]:
        """Name and shape of each stored factor, in the order in which they are stored."""

    @abstractmethod
    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        """W (rows, cols), rebuilt. For reports, export and tests, not for inference."""

    @abstractmethod
    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias` without building W: x (..., cols) -> (..., rows)."""

    @property
    def native(self) -> Native | None:
        """`matmul` for the compiled kernel of core/native.py; None where PyTorch does it."""
        return None

    @abstractmethod
    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """`W[index]` without building W: integers (...) -> (..., cols)."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of `matmul` per token (bias left out); the conformance suite counts them."""

    @property
    @abstractmethod
    def lookup_macs(self) -> int:
        """Multiply-adds of `take_rows` per token."""

    def operations(self, tokens: int) -> Sequence[Operation]:
        """What `matmul` does for this many tokens, from which its time is predicted.

        Unless overridden: two products of the width that gives `macs`, and a pass for each factor beyond two.
        """
        width = max(1, round(self.macs / (self.rows + self.cols)))
        passes = max(0, len(self.factor_specs()) - 2)
        ends = (Gemm(tokens, width, self.cols), Gemm(tokens, self.rows, width))
        return (*ends, *[Pass(tokens * (self.rows + self.cols))] * passes)

    def lookup_operations(self, tokens: int) -> Sequence[Operation]:
        """What `take_rows` does for this many tokens.

        Unless overridden: what is looked up, and a product that gives `lookup_macs`.
        """
        width = max(1, round(self.lookup_macs / self.cols))
        return (Pass(2 * tokens * width), Gemm(tokens, self.cols, width))

    @final
    @cached_property
    def num_params(self) -> int:
        return sum(spec.num_params for spec in self.factor_specs().values())

    @final
    def to_json(self) -> dict[str, Any]:
        """`{"kind": ..., field: int or list of int}`; `structure_from_json` is the way back."""
        return {"kind": self.kind, **{k: _plain(v) for k, v in dataclasses.asdict(self).items()}}

    @final
    def __str__(self) -> str:
        sizes = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.name not in ("rows", "cols")
        ]
        return f"{self.kind}({', '.join(sizes)})"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def empty_factors(structure: Structure, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Uninitialised factors of a structure; on device `meta` nothing is allocated."""
    return {
        name: torch.empty(spec.shape, dtype=dtype, device=device) for name, spec in structure.factor_specs().items()
    }
