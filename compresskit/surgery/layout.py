"""Layout: which module of a compressed model has which structure, as plain data.

It is what a checkpoint stores beside its tensors: with it a fresh dense model is given its empty factorised
modules, into which the tensors then load by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.core.decomposition import is_conv1d, module_from
from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear, FactorizedModule
from compresskit.core.registry import structure_from_json
from compresskit.core.structure import Structure, empty_factors
from compresskit.errors import CheckpointError

MAX_OVERSIZE = 4
"""Factors in a checkpoint may hold at most this many times the parameters of the weight that they stand for."""


@final
@dataclass(frozen=True)
class Entry:
    """One factorised module.

    Args:
        structure: sizes of its factorisation.
        shares: factor name -> the earlier module that owns this parameter, for tied and shared factors.
    """

    structure: Structure
    shares: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"structure": self.structure.to_json(), **({"shares": dict(self.shares)} if self.shares else {})}

    @staticmethod
    def from_json(name: str, data: Any) -> "Entry":
        """The entry that `to_json` wrote.

        Raises:
            CheckpointError: unknown structure, insane sizes, or not an entry at all.
        """
        if not isinstance(data, Mapping) or not set(data) <= {"structure", "shares"} or "structure" not in data:
            raise CheckpointError(f"the map of {name!r} must hold 'structure' and perhaps 'shares', got {data!r}")
        structure = structure_from_json(data["structure"])
        shares = data.get("shares", {})
        factors = structure.factor_specs()
        if not isinstance(shares, Mapping) or not all(k in factors and isinstance(v, str) for k, v in shares.items()):
            raise CheckpointError(
                f"'shares' of {name!r} maps factors ({', '.join(factors)}) to modules, got {shares!r}"
            )
        if structure.num_params > MAX_OVERSIZE * structure.rows * structure.cols:
            raise CheckpointError(
                f"the factors of {name!r} would hold {structure.num_params:,} parameters, more than {MAX_OVERSIZE} "
                f"times its {structure.rows} x {structure.cols} weight; the map is damaged"
            )
        return Entry(structure, dict(shares))


Layout = Mapping[str, Entry]


def layout_of(model: nn.Module) -> dict[str, Entry]:
    """The layout of a model: every factorised module in the model's order; empty for a dense model."""
    owners: dict[tuple[int, str], str] = {}
    layout: dict[str, Entry] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedModule):
            shares = {
                factor: owner
                for factor, parameter in module.factors().items()
                if (owner := owners.setdefault((id(parameter), factor), name)) != name
            }
            layout[name] = Entry(module.structure, shares)
    return layout


def install_(model: nn.Module, layout: Layout) -> None:
    """Give a dense model the empty factorised modules of a layout; every name must exist. Changes the model.

    Factors are uninitialised, on the device (`meta` while a checkpoint loads) and in the dtype of the weight
    that they replace.

    Raises:
        CheckpointError: a name is missing, or a module is of another kind or shape; nothing is changed then.
    """
    modules = {name: _replaceable(model, name, entry) for name, entry in layout.items()}
    owned: dict[tuple[str, str], nn.Parameter] = {}
    swap_(model, {name: _empty_module(name, entry, modules[name], owned) for name, entry in layout.items()})


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every factorised module by the dense layer that it stands for; tied ones stay tied. Changes the model."""
    dense: dict[tuple[int, ...], nn.Parameter] = {}
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedModule):
            key = tuple(id(parameter) for parameter in module.factors().values())
            made[name] = _dense_module(module, dense, key, dtype)
    swap_(model, made)


def swap_(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in its place; a module that stands in several places is swapped in all of them."""
    for name, module in modules.items():
        old = model.get_submodule(name)
        for place in _places(model, old):
            model.set_submodule(place, module)


def _places(model: nn.Module, module: nn.Module) -> Iterable[str]:
    return [name for name, found in model.named_modules(remove_duplicate=False) if found is module]


def _replaceable(model: nn.Module, name: str, entry: Entry) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the map names {name!r}, which {type(model).__name__} does not have") from None
    if not (isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)):
        raise CheckpointError(
            f"the map names {name!r}, which is a {type(module).__name__}, not a linear layer or embedding"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = tuple(weight.T.shape if is_conv1d(module) else weight.shape)
    if shape != (entry.structure.rows, entry.structure.cols):
        raise CheckpointError(
            f"the map says that {name!r} is {entry.structure.rows} x {entry.structure.cols}, the model's is "
            f"{shape[0]} x {shape[1]}"
        )
    return module


def _empty_module(name: str, entry: Entry, like: nn.Module, owned: dict[tuple[str, str], nn.Parameter]) -> nn.Module:
    """Empty factors in place of `like`; those that others own too are taken from `owned`, whoever comes first."""
    weight = like.weight
    assert isinstance(weight, Tensor)
    factors: dict[str, nn.Parameter] = {}
    for factor, tensor in empty_factors(entry.structure, dtype=weight.dtype, device=weight.device).items():
        owner = entry.shares.get(factor, name)
        factors[factor] = owned.setdefault((owner, factor), nn.Parameter(tensor, weight.requires_grad))
        if factors[factor].shape != tensor.shape:
            raise CheckpointError(
                f"the map says that {name!r} shares its factor {factor!r} {tuple(tensor.shape)} with {owner!r}, where "
                f"it is {tuple(factors[factor].shape)}"
            )
    return module_from(entry.structure, factors, like)


def _dense_module(
    module: FactorizedModule,
    dense: dict[tuple[int, ...], nn.Parameter],
    key: tuple[int, ...],
    dtype: torch.dtype | None,
) -> nn.Module:
    with torch.no_grad():
        weight = module.rebuilt_weight().contiguous()
    weight = weight if dtype is None else weight.to(dtype)
    requires_grad = any(parameter.requires_grad for parameter in module.factors().values())
    parameter = dense.setdefault(key, nn.Parameter(weight, requires_grad))
    plain = _dense_shell(module)
    plain.weight = parameter
    if isinstance(module, FactorizedLinear) and module.bias is not None:
        plain.bias = module.bias
    return plain.train(module.training)


def _dense_shell(module: FactorizedModule) -> nn.Module:
    """The dense layer without its weight, on `meta`."""
    rows, cols = module.structure.rows, module.structure.cols
    if isinstance(module, FactorizedEmbedding):
        return nn.Embedding(rows, cols, padding_idx=module.padding_idx, device="meta")
    assert isinstance(module, FactorizedLinear)
    if module.stored_transposed:
        from transformers.pytorch_utils import Conv1D  # only models that had one come here

        with torch.device("meta"):
            conv: nn.Module = Conv1D(rows, cols)
        return conv
    return nn.Linear(cols, rows, bias=module.bias is not None, device="meta")
