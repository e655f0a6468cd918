"""From what modules saw to the importance of each site's weight."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compresskit.calibration.moments import Calibration, Use
from compresskit.core.importance import Importance
from compresskit.surgery.sites import Site, Survey, find_sites, site_weight

EVEN_SHARE = 0.5
"""Share of an embedding's weight that is spread evenly over its rows: a sample names few of a vocabulary's words, and
the others must not become noise."""


def importances_of(
    calibration: Calibration, model: nn.Module, survey: Survey | None = None, *, centre: bool = True
) -> dict[str, Importance]:
    """Importance by site name, for the sites that samples came to.

    A layer with a bias gets its second moment about the mean of its inputs, and that mean: the bias then takes up the
    mean error, and what remains is what the factors have to fit. Where a weight is tied, each use counts alike.

    Args:
        centre: false: second moments as they are and no correction of biases.

    Raises:
        CalibrationError: the calibration was made for another model.
    """
    survey = survey or find_sites(model)
    calibration.check(model, survey)
    made = {site.name: _importance(calibration, model, site, centre=centre) for site in survey.sites}
    return {name: importance for name, importance in made.items() if importance is not None}


def _importance(calibration: Calibration, model: nn.Module, site: Site, *, centre: bool) -> Importance | None:
    found = [(name, calibration.uses[name]) for name in site.names if name in calibration.uses]
    parts = [_of_use(use, centre=centre and _has_bias(model, name)) for name, use in found]
    return parts[0] if len(parts) == 1 else _merged(parts, site_weight(model, site)) if parts else None


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


def _of_use(use: Use, *, centre: bool) -> Importance:
    if use.counts is not None:
        even = use.counts.mean()
        rows = (1 - EVEN_SHARE) * use.counts + EVEN_SHARE * even
        return Importance(cols=use.gradients, rows=rows / even)
    importance = Importance(cols=use.inputs, rows=use.gradients, mean=use.mean if centre else None)
    return importance.centred() if centre else importance


def _merged(parts: Sequence[Importance], weight: Tensor) -> Importance:
    """One importance R x C for a weight that several modules hold.

    Each module's error counts relative to the energy of its own output. A sum of products R_i x C_i is no product;
    the nearest in the sense of equal sums over rows and over columns stands for it.
    """
    rows: Tensor | None = None
    cols: Tensor | None = None
    for part in parts:
        energy = part.squared_norm(weight.float()) or 1.0
        r, c = _full(part.rows, weight.shape[0], weight), _full(part.cols, weight.shape[1], weight)
        mine, theirs = r * (_trace(c) / energy), c * (_trace(r) / energy)
        rows = mine if rows is None else _sum(rows, mine)
        cols = theirs if cols is None else _sum(cols, theirs)
    assert rows is not None
    assert cols is not None
    means = [part.mean for part in parts if part.mean is not None]
    return Importance(cols=cols, rows=rows / _trace(cols), mean=means[0] if len(means) == 1 else None)


def _full(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    return torch.ones(size) if moment is None else moment.float().cpu()


def _trace(moment: Tensor) -> float:
    return float(moment.sum() if moment.dim() == 1 else moment.diagonal().sum())


def _sum(one: Tensor, other: Tensor) -> Tensor:
    if one.dim() == other.dim():
        return one + other
    full, diagonal = (one, other) if one.dim() == 2 else (other, one)
    return full + torch.diag(diagonal)
