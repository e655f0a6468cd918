"""Layers of other libraries, and ours of the same structure. Imports torch: import it late.

Each peer is given its factors, whose dense weight is then fitted by us: a weight that has the structure is fitted
exactly, so both layers hold the same numbers of parameters and compute the same function.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compresskit
from benchmarks.experiments import ExperimentSkipped, nearest

Forward = Callable[[Tensor], Tensor]

SMALL = 8
"""Side of the small Kronecker factor and of the first folded mode."""
TERMS = 4
RANK = 64
TUCKER_RANKS = (4, 40)
"""Of the folded rows; the columns have RANK."""


@final
@dataclass(frozen=True)
class Peer:
    """One layer of another library.

    Args:
        forward: x (tokens, cols) -> (tokens, rows).
        weight: the dense weight (rows, cols) that it stands for.
        num_params: that it stores; bias not counted.
        ours: the decomposition that has the same structure.
    """

    forward: Forward
    weight: Tensor
    num_params: int
    ours: compresskit.Decomposition


@final
@dataclass(frozen=True)
class Place:
    """Where and in which type a layer runs."""

    device: torch.device
    dtype: torch.dtype

    def move(self, value: Any) -> Any:
        """A tensor or module there."""
        return value.to(device=self.device, dtype=self.dtype)


def _tltorch(rows: int, cols: int, factorization: str, place: Place) -> tuple[Forward, Tensor, int]:
    _need("tensorly-torch", "opt_einsum")
    from tltorch import FactorizedLinear

    both = (rows,), (cols,)
    if (
        factorization != "CP"
    ):  # its Tucker layers need as many modes on one side as on the other: the columns have (1, n)
        both = (SMALL, rows // SMALL), (SMALL, cols // SMALL) if factorization == "BlockTT" else (1, cols)
    outs, ins = both
    rank = {"BlockTT": (1, TERMS, 1), "CP": RANK, "Tucker": (*TUCKER_RANKS, 1, RANK)}[factorization]
    layer = FactorizedLinear(ins, outs, bias=False, factorization=factorization, rank=rank, implementation="factorized")
    weight = layer.weight.to_matrix().detach()
    return place.move(layer), weight, sum(parameter.numel() for parameter in layer.parameters())


def _tltorch_block_tt(rows: int, cols: int, place: Place) -> Peer:
    """A block tensor train of two modes is a sum of Kronecker products, as many as its rank."""
    ours = compresskit.Kronecker(terms=TERMS, left=(SMALL, SMALL))
    return Peer(*_tltorch(rows, cols, "BlockTT", place), ours)


def _tltorch_cp(rows: int, cols: int, place: Place) -> Peer:
    """CP of a matrix is a low-rank product; it stores a weight of each component besides."""
    return Peer(*_tltorch(rows, cols, "CP", place), compresskit.SVD(rank=RANK))


def _tltorch_tucker(rows: int, cols: int, place: Place) -> Peer:
    options = {"heads": str(SMALL), "ranks": "x".join(map(str, (*TUCKER_RANKS, RANK)))}
    return Peer(*_tltorch(rows, cols, "Tucker", place), compresskit.decomposition("tucker", options))


def _kronecker_factors(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return torch.randn(SMALL, SMALL), torch.randn(rows // SMALL, cols // SMALL)


def _kronecker_peer(forward: Forward, small: Tensor, wide: Tensor) -> Peer:
    ours = compresskit.Kronecker(left=(SMALL, SMALL))
    return Peer(forward, torch.kron(small, wide), small.numel() + wide.numel(), ours)


def _peft_lokr(rows: int, cols: int, place: Place) -> Peer:
    """What the adapter adds to its base layer in each forward pass; the base layer's own product is not counted."""
    _need("peft")
    from peft import LoKrConfig, get_peft_model

    config = LoKrConfig(r=rows, alpha=rows, target_modules=["0"], decompose_factor=SMALL, init_weights=False)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(cols, rows, bias=False)), config)
    layer = model.base_model.model[0]
    small, wide = (layer.lokr_w1["default"].detach().clone(), layer.lokr_w2["default"].detach().clone())
    place.move(layer)
    return _kronecker_peer(lambda x: F.linear(x, layer.get_delta_weight("default")), small, wide)


def _linear_operator(rows: int, cols: int, place: Place) -> Peer:
    _need("linear-operator")
    from linear_operator import to_linear_operator
    from linear_operator.operators import KroneckerProductLinearOperator

    small, wide = _kronecker_factors(rows, cols)
    operator = KroneckerProductLinearOperator(*(to_linear_operator(place.move(factor)) for factor in (small, wide)))
    return _kronecker_peer(lambda x: operator.matmul(x.mT).mT, small, wide)


def _fastkron(rows: int, cols: int, place: Place) -> Peer:
    _need("pyfastkron")
    from pyfastkron.fastkrontorch import gemkm

    if place.dtype != torch.float32:
        raise ExperimentSkipped(f"FastKron multiplies float32 and float64, not {place.dtype}")
    small, wide = _kronecker_factors(rows, cols)
    factors = [place.move(factor.T.contiguous()) for factor in (small, wide)]  # x @ (small (x) wide).T
    return _kronecker_peer(lambda x: gemkm(x, factors), small, wide)


PEERS: Mapping[str, Callable[[int, int, Place], Peer]] = {
    "tltorch-block-tt": _tltorch_block_tt,
    "tltorch-cp": _tltorch_cp,
    "tltorch-tucker": _tltorch_tucker,
    "peft-lokr": _peft_lokr,
    "linear-operator": _linear_operator,
    "fastkron": _fastkron,
}


def make_peer(name: str, rows: int, cols: int, place: Place) -> Peer:
    """The layer of a peer, with random factors.

    Raises:
        ExperimentSkipped: it is not installed, or cannot run there.
        SuiteError: no peer of this name.
    """
    return PEERS[nearest(name, PEERS, "peer")](rows, cols, place)


def our_layer(peer: Peer, place: Place) -> tuple[nn.Module, int]:
    """Our layer of the same function as a peer's, and the parameters that it stores."""
    fitted = peer.ours.fit(peer.weight, ratio=1)
    return place.move(fitted.to_module()), fitted.structure.num_params


def _need(*packages: str) -> None:
    """Raise ExperimentSkipped unless all are installed."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            remedy = "--no-deps pyfastkron" if package == "pyfastkron" else "'compresskit[bench]'"
            raise ExperimentSkipped(f"{package} is not installed: pip install {remedy}") from error
