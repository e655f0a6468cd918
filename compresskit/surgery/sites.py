"""Sites: the weights of a model that can be replaced, tied modules as one site with several names."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresskit.core.decomposition import is_conv1d
from compresskit.core.modules import FactorizedModule

Kind = Literal["linear", "embedding", "conv1d"]

MIN_SIDE = 16
"""Weights with fewer rows or columns (a classifier of two labels) are left alone: little to gain, much to lose."""


@final
@dataclass(frozen=True)
class Site:
    """One weight that can be replaced.

    Args:
        name: the first module that holds it, in the model's order.
        names: all modules that hold it, the first included; more than one if tied.
        kinds: what each of `names` is.
        rows, cols: shape of the weight as (out, in); an embedding is (words, dim).
        extra_params: parameters that stay beside the factors: the exact padding rows of embeddings.
    """

    name: str
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    rows: int
    cols: int
    extra_params: int = 0

    @property
    def num_params(self) -> int:
        return self.rows * self.cols

    @property
    def lookup(self) -> bool:
        """True if rows are looked up one at a time somewhere."""
        return "embedding" in self.kinds

    @property
    def multiplied(self) -> int:
        """How many modules multiply by this weight (the others look up rows)."""
        return sum(kind != "embedding" for kind in self.kinds)


@final
@dataclass(frozen=True)
class Refusal:
    """A weight matrix that is left as it is, and why."""

    name: str
    num_params: int
    reason: str


@final
@dataclass(frozen=True)
class Survey:
    """What was found in a model.

    Args:
        sites: weights that can be replaced, in the model's order.
        refusals: weight matrices that cannot, each with its reason.
        num_params: all parameters of the model, tied ones counted once.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    num_params: int

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that sites hold."""
        return sum(site.num_params for site in self.sites) / max(self.num_params, 1)


def count_params(model: nn.Module) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_sites(model: nn.Module) -> Survey:
    """Every weight of the model that can be replaced, and every weight matrix that cannot, with the reason."""
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module, weight in _matrices(model):
        groups.setdefault(id(weight), []).append((name, module))
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for weight_id, holders in groups.items():
        reasons = {reason for _, module in holders if (reason := _refusal(module))}
        reasons |= _group_refusals(holders, uses[weight_id])
        if reasons:
            name, first = holders[0]
            refusals.append(Refusal(name, sum(p.numel() for p in _own_matrices(first)), "; ".join(sorted(reasons))))
        else:
            sites.append(_site(holders))
    refusals += [*_factorised(model), *_stray_matrices(model)]
    return Survey(tuple(sites), tuple(refusals), count_params(model))


def site_weight(model: nn.Module, site: Site) -> Tensor:
    """The weight of a site as (rows, cols); a view of the model's own tensor."""
    weight = model.get_submodule(site.name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if site.kinds[0] == "conv1d" else weight.detach()


_NOT_A_LAYER = "a parameter of its own, not the weight of a linear layer or an embedding"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Each module that looks like a linear layer or an embedding, once, with the tensor that identifies its weight."""
    inner = {part for module in model.modules() if isinstance(module, FactorizedModule) for part in module.modules()}
    for name, module in model.named_modules():
        if module in inner or not (isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)):
            continue
        if parametrize.is_parametrized(module, "weight"):
            yield name, module, next(module.parametrizations.weight.parameters())
        elif isinstance(module.weight, Tensor):
            yield name, module, module.weight


def _factorised(model: nn.Module) -> Iterator[Refusal]:
    """The modules that a compression made, shared factors with the first that holds them."""
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, FactorizedModule):
            factors = {parameter for parameter in module.parameters() if parameter.dim() >= 2} - seen
            seen |= factors
            yield Refusal(name, sum(factor.numel() for factor in factors), "it is factorised already")


def _stray_matrices(model: nn.Module) -> Iterator[Refusal]:
    """Parameters with two or more dimensions that no linear layer, embedding or factorised module holds, each once."""
    held = {id(parameter) for _, module, _ in _matrices(model) for parameter in _own_matrices(module)}
    held |= {id(p) for module in model.modules() if isinstance(module, FactorizedModule) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in held:
            yield Refusal(name, parameter.numel(), _NOT_A_LAYER)


def _own_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weight of a module, or what a parametrisation computes it from; nothing of its children."""
    own = [*module.parameters(recurse=False)]
    if parametrize.is_parametrized(module):
        own += module.get_submodule("parametrizations").parameters()
    return [parameter for parameter in own if parameter.dim() >= 2]


def _group_refusals(holders: list[tuple[str, nn.Module]], uses: int) -> set[str]:
    """Why modules that share one weight, of which there are `uses` in the model, must keep it."""
    reasons = set()
    if len({is_conv1d(module) for _, module in holders}) > 1:
        reasons.add("it is tied between layers that store it in different directions")
    if uses > len(holders):
        reasons.add("its weight is also a parameter of a module that is no linear layer or embedding")
    if not holders[0][0]:
        reasons.add("it is the whole model, with no place to put another module; fit its weight instead")
    return reasons


def _refusal(module: nn.Module) -> str | None:
    """Why this module must not be replaced, or None."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if parametrize.is_parametrized(module) or "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is parametrised (computed from something else)"
    if type(module) not in (nn.Linear, nn.Embedding) and not is_conv1d(module):
        return f"{type(module).__name__} is a subclass that may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (by accelerate, for example), which would be lost"
    if weight.is_meta:
        return "its weight is on the meta device: no values are loaded"
    if weight.dim() != 2 or not weight.is_floating_point():
        return f"its weight is {tuple(weight.shape)} of {weight.dtype}, not a real matrix"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it carries hooks, which would be lost"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "an embedding with max_norm or sparse gradients changes or reads its rows one by one"
    if min(weight.shape) < MIN_SIDE:
        return f"fewer than {MIN_SIDE} rows or columns"
    return None


def _site(holders: list[tuple[str, nn.Module]]) -> Site:
    kinds = tuple(_kind(module) for _, module in holders)
    first = holders[0][1]
    assert isinstance(first.weight, Tensor)
    rows, cols = first.weight.T.shape if kinds[0] == "conv1d" else first.weight.shape
    padded = sum(isinstance(module, nn.Embedding) and module.padding_idx is not None for _, module in holders)
    return Site(holders[0][0], tuple(name for name, _ in holders), kinds, rows, cols, padded * cols)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if is_conv1d(module) else "linear"
