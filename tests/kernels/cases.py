"""Kronecker products for the tests of their kernels, and what they have to give, in float64."""

import torch

from compresskit.core.modules import FactorizedLinear
from compresskit.decompositions.kronecker import KroneckerSum

SMALL = ((2, 2), (4, 4), (8, 8), (2, 8), (8, 2), (16, 2), (1, 16), (3, 5))
WIDE = ((34, 40), (40, 34))
"""More rows than columns and the reverse, so that both orders of contraction are stored; no multiples of a tile."""
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the error / the exact output, in Frobenius norm; tf32 has its own."""
TF32_BOUND = 1e-3


def structure_of(small, wide, terms, left, padding=0):
    (p, q), (r, s) = small, wide
    factors = (small, wide) if left else (wide, small)
    return KroneckerSum(p * r - padding, q * s, *factors, terms)


def layer_of(structure, dtype, *, bias=True, device="cpu"):
    random = torch.Generator().manual_seed(structure.rows + structure.cols + structure.num_params)
    factors = {name: torch.randn(spec.shape, generator=random) for name, spec in structure.factor_specs().items()}
    offset = torch.randn(structure.rows, generator=random) if bias else None
    return FactorizedLinear(structure, factors, offset).to(device=device, dtype=dtype)


def exact(layer, x):
    """x @ W.T + bias in float64 on a CPU, of the numbers that the layer holds."""
    factors = {name: value.detach().cpu().double() for name, value in layer.factors().items()}
    y = x.cpu().double() @ layer.structure.dense(factors).T
    return y if layer.bias is None else y + layer.bias.detach().cpu().double()


def error(found, wanted):
    """Relative, in Frobenius norm; not a number where any of `found` is none."""
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())


def gradients(layer, x, upstream, wanted=None):
    """Of input and parameters in their order, or of those that are wanted."""
    inputs = [x, *layer.parameters()]
    chosen = [tensor for k, tensor in enumerate(inputs) if wanted is None or wanted[k]]
    for tensor in inputs:
        tensor.requires_grad_(any(tensor is other for other in chosen))
    return torch.autograd.grad(layer(x), chosen, upstream)
