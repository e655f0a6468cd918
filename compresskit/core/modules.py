"""The two modules that hold factors. They know a structure, never the name of a method."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.core.lazy import LazyWeight
from compresskit.core.native import Native, kernel
from compresskit.core.once import compute_now
from compresskit.core.structure import Factor, Structure, TensorSpec, plain_matrix
from compresskit.errors import StructureError


class FactorizedModule(nn.Module):
    """What both modules share: a structure, its factors, and a read-only `weight` that is rebuilt on demand."""

    structure: Structure

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        compute_now(structure)
        self.structure = structure
        self._factor_names = tuple(structure.factor_specs())  # asked for in every forward

    def factor_keys(self) -> dict[str, str]:
        """Name of each factor -> name of its parameter below this module."""
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    @final
    def factors(self) -> dict[str, nn.Parameter]:
        """The parameters by factor name; the objects themselves, shared with tied modules."""
        return {name: self.get_parameter(key) for name, key in self.factor_keys().items()}

    @final
    def _own(self, name: str) -> Any:
        """`getattr(self, name)` of a parameter or child in a fifth of the time, which counts at a few tokens."""
        if name in self._parameters:
            return self._parameters[name]
        return self._modules[name] if name in self._modules else getattr(self, name)

    def rebuilt_weight(self) -> Tensor:
        """The dense weight that this module stands for, in the layout of the layer that it replaced."""
        return self.structure.dense(self.factors())

    @property
    def weight(self) -> Tensor:
        """Read-only; shape, dtype and device cost nothing, anything else rebuilds the matrix."""
        if torch.compiler.is_compiling():
            return self.rebuilt_weight()  # unused values are dropped by the compiler
        like = next(iter(self.factors().values()))
        return LazyWeight.of(self._weight_shape(), like, self.rebuilt_weight)

    def _weight_shape(self) -> tuple[int, int]:
        return self.structure.rows, self.structure.cols

    @final
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight is rebuilt from its factors ({', '.join(self.factor_keys())}) and "
                "cannot be assigned; change the factors, or call compresskit.dequantize_(model) first"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Drop the one-element `weight` that saved files carry, so that nobody takes them for dense ones."""
        if state_dict.get(f"{prefix}weight", torch.empty(0)).shape == (1,):
            del state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.structure.cols}, {self.structure.rows}, {self.structure}"


def _check(structure: Structure, factors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    specs = structure.factor_specs()
    found = {name: tuple(tensor.shape) for name, tensor in factors.items()}
    wanted = {name: spec.shape for name, spec in specs.items()}
    if found != wanted:
        raise StructureError(f"{structure} needs factors {wanted}, got {found}")
    return specs


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


@final
class FactorizedLinear(FactorizedModule):
    """`y = x @ W.T + bias` with W held as factors; stands where `nn.Linear` or `Conv1D` stood.

    Args:
        structure: sizes of the factorisation of W (out_features, in_features).
        factors: tensors of the structure's shapes; an `nn.Parameter` is used as it is, so that modules can share it.
        bias: (out_features,) or None; likewise.

    Factors that act as plain matrices are `nn.Linear` children, where PEFT and torchao find them.
    """

    bias: nn.Parameter | None
    stored_transposed: bool = False
    """True where a Conv1D stood, whose weight is (in_features, out_features): `weight` then has that shape too."""

    def __init__(self, structure: Structure, factors: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        super().__init__(structure)
        self._native = structure.native  # asked for in every forward
        compute_now(self._native)
        kernel.look()  # a compiler cannot
        self.in_features, self.out_features = structure.cols, structure.rows  # callers assign them, as nn.Linear
        if bias is not None and bias.shape != (structure.rows,):
            raise StructureError(f"the bias of {structure.rows} outputs has shape {tuple(bias.shape)}")
        specs = _check(structure, factors)
        self._factor_names = tuple(specs)
        for name, spec in specs.items():
            parameter = _as_parameter(factors[name])
            if spec.matrix:
                child = nn.Linear(spec.shape[1], spec.shape[0], bias=False, device="meta")
                child.weight = parameter
                self.add_module(name, child)
            else:
                self.register_parameter(name, parameter)
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))

    def factor_keys(self) -> dict[str, str]:
        specs = self.structure.factor_specs()
        return {name: f"{name}.weight" if spec.matrix else name for name, spec in specs.items()}

    def rebuilt_weight(self) -> Tensor:
        weight = super().rebuilt_weight()
        return weight.T if self.stored_transposed else weight

    def _weight_shape(self) -> tuple[int, int]:
        rows, cols = super()._weight_shape()
        return (cols, rows) if self.stored_transposed else (rows, cols)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        structure, shape = self.structure, x.shape
        if not shape or shape[-1] != structure.cols:
            raise StructureError(
                f"this layer takes (..., {structure.cols}) and got {tuple(shape)}: the last sizes must agree"
            )
        if (
            self._native is not None
            and (dtype := kernel.takes(x)) is not None
            and (y := self._by_kernel(x, dtype, self._native)) is not None
        ):
            return y
        factors: dict[str, Factor] = {name: self._own(name) for name in self._factor_names}
        return structure.matmul(x, factors, self._own("bias"))

    def _by_kernel(self, x: Tensor, dtype: torch.dtype, native: Native) -> Tensor | None:
        """The same by the compiled kernel, where no factor has to be called."""
        if dtype is not torch.float32 and not native.half_ever:  # said at once: the rest takes 5 us
            return None
        factors = []
        for name in native.factors:
            tensor: Tensor | None = self._parameters.get(name)
            if type(tensor) is not nn.Parameter:
                tensor = plain_matrix(self._own(name))
                if tensor is None:
                    return None
            factors.append(tensor)
        return kernel.chain(x, dtype, factors, native, self._own("bias"))


@final
class FactorizedEmbedding(FactorizedModule):
    """`W[index]` with W held as factors; stands where `nn.Embedding` stood.

    Args:
        structure: sizes of the factorisation of W (num_embeddings, embedding_dim).
        factors: tensors of the structure's shapes; an `nn.Parameter` is used as it is, so that modules can share it.
        padding_idx: this row is returned exactly as `padding_row` and gets no gradient.
        padding_row: (embedding_dim,), stored beside the factors; None without `padding_idx`.
    """

    def __init__(
        self,
        structure: Structure,
        factors: Mapping[str, Tensor],
        *,
        padding_idx: int | None = None,
        padding_row: Tensor | None = None,
    ) -> None:
        super().__init__(structure)
        if (padding_idx is None) != (padding_row is None):
            raise StructureError("padding_idx and padding_row come together")
        if padding_idx is not None and not 0 <= padding_idx < structure.rows:
            raise StructureError(f"padding_idx is a row, 0 to {structure.rows - 1}; got {padding_idx}")
        if padding_row is not None and padding_row.shape != (structure.cols,):
            raise StructureError(f"the padding row of {structure.cols} columns has shape {tuple(padding_row.shape)}")
        for name in _check(structure, factors):
            self.register_parameter(name, _as_parameter(factors[name]))
        self.num_embeddings, self.embedding_dim = structure.rows, structure.cols  # callers assign them, as nn.Embedding
        self.padding_idx = padding_idx
        self.padding_row: nn.Parameter | None
        row = None if padding_row is None else nn.Parameter(padding_row.detach(), requires_grad=False)
        self.register_parameter("padding_row", row)

    def factor_keys(self) -> dict[str, str]:
        return {name: name for name in self.structure.factor_specs()}

    def rebuilt_weight(self) -> Tensor:
        weight = super().rebuilt_weight()
        if self.padding_row is None:
            return weight
        padding = torch.arange(self.structure.rows, device=weight.device).eq(self.padding_idx or 0)
        return torch.where(padding[:, None], self.padding_row.detach(), weight)

    def forward(self, index: Tensor) -> Tensor:
        """index (...) -> (..., embedding_dim)."""
        y = self.structure.take_rows(index, {name: self._own(name) for name in self._factor_names})
        return y if self.padding_row is None else _with_padding(y, index.eq(self.padding_idx or 0), self.padding_row)


def _with_padding(y: Tensor, padding: Tensor, row: Tensor) -> Tensor:
    """y (..., cols), `row` where `padding` (...) is true; no gradient reaches `row`.

    A second pass over y can cost more than the lookup itself: in eager mode on a CPU only the padding rows are
    written, in place. Measured (bert-base's word embeddings, Kronecker at 8, 4096 tokens): 0.6 x the dense lookup's
    time, 2.0 x with `torch.where`. A compiler fuses the pass, and on a GPU it is cheaper than finding the rows.
    """
    row = row.detach()
    if y.device.type != "cpu" or torch.compiler.is_compiling() or padding.dim() == 0:
        return torch.where(padding[..., None], row, y)
    return y.index_put_((padding,), row.to(y.dtype))  # under autocast y is narrower
