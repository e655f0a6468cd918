"""SVD-LLM's and ASVD's fits, written out from the papers, to compare ours with. Imports torch: import it late.

SVD-LLM (Wang et al., ICLR 2025, section 3.1): with S the Cholesky factor of X X^T, the SVD of W S is truncated and S
taken off the right factor again; every layer keeps the same share. ASVD (Yuan et al. 2023, section 3.2): the same, S
being the diagonal of mean(|x|)^0.5. Its search for ranks by perplexity is left out: the models here have no language
head. The papers leave embeddings dense; where the scope holds one, it gets a plain SVD of the same share.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import compresskit

ALPHA = 0.5
"""ASVD's exponent."""
RIDGE = 1e-6
"""Share of the mean diagonal added where X X^T is singular; SVD-LLM's code adds the least eigenvalue."""

Scale = Callable[[Tensor, Tensor], Tensor]


def svd_llm(second: Tensor, magnitude: Tensor) -> Tensor:
    """S (cols, cols) from E[x x^T]."""
    wide = second.double()
    ridge = RIDGE * float(wide.diagonal().mean())
    for _ in range(12):
        factor, failed = torch.linalg.cholesky_ex(wide + ridge * torch.eye(len(wide), dtype=wide.dtype))
        if not failed:
            return factor
        ridge *= 10
    raise RuntimeError("the second moment is not positive semi-definite")


def asvd(second: Tensor, magnitude: Tensor) -> Tensor:
    """S (cols, cols) from mean |x|."""
    return torch.diag(magnitude.double().clamp_min(1e-6).pow(ALPHA))


BASELINES: Mapping[str, Scale] = {"svd-llm": svd_llm, "asvd": asvd}


def baseline_(model: nn.Module, name: str, batches: Sequence[Any], names: Sequence[str], max_params: int) -> None:
    """Replace layers by the baseline's factors; the model then has at most `max_params` parameters. Changes the model.

    Args:
        batches: samples.
        names: of the layers.
    """
    survey = compresskit.find_sites(model)
    sites = [site for site in survey.sites if site.name in names]
    rest = survey.num_params - sum(site.num_params for site in sites)
    ranks = _uniform_ranks([(site.rows, site.cols, site.extra_params) for site in sites], max_params - rest)
    seen = _inputs(model, [site.name for site in sites if not site.lookup], batches)
    low_rank = compresskit.methods()["svd"].structures[0]
    modules: dict[str, nn.Module] = {}
    for site, rank in zip(sites, ranks, strict=True):
        layer = model.get_submodule(site.name)
        weight = layer.weight.detach().double()
        scale = BASELINES[name](*seen[site.name]) if site.name in seen else torch.eye(site.cols, dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight @ scale, full_matrices=False)
        root = values[:rank].sqrt()
        factors = {
            "left": (left[:, :rank] * root).float().contiguous(),
            "right": torch.linalg.solve(scale.T, (root[:, None] * right[:rank]).T).T.float().contiguous(),
        }
        structure = low_rank(site.rows, site.cols, rank)  # type: ignore[call-arg]
        modules[site.name] = compresskit.Fitted(structure, factors, 0.0).to_module(like=layer)
    for site_name, module in modules.items():
        model.set_submodule(site_name, module)


def _uniform_ranks(shapes: Sequence[tuple[int, int, int]], budget: int) -> list[int]:
    """The largest ranks that keep one share of every weight within the budget."""

    def ranks(keep: float) -> list[int]:
        return [max(1, int(keep * rows * cols / (rows + cols))) for rows, cols, _ in shapes]

    def size(keep: float) -> int:
        return sum(r * (rows + cols) + extra for r, (rows, cols, extra) in zip(ranks(keep), shapes, strict=True))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return ranks(low)


def _inputs(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """E[x x^T] and E|x| of each layer, padding left out."""
    sums: dict[str, list[Any]] = {}
    mask = torch.empty(0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any) -> None:
            x = args[0][mask] if args[0].shape[:2] == mask.shape else args[0]
            found = sums.setdefault(name, [0.0, 0.0, 0])
            found[0] = found[0] + x.T @ x
            found[1] = found[1] + x.abs().sum(0)
            found[2] += len(x)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.inference_mode():
        for batch in batches:
            mask = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (second / count, magnitude / count) for name, (second, magnitude, count) in sums.items()}
