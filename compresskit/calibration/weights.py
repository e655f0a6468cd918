"""From what modules saw to the importance of each site's weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from compresskit.calibration.moments import Calibration, Use
from compresskit.core.importance import Importance
from compresskit.errors import PlanError
from compresskit.surgery.plan import Plan
from compresskit.surgery.sites import Site, Survey, find_sites, site_weight

EVEN_SHARE = 0.5
"""Share of an embedding's weight that is spread evenly over its rows: a sample names few of a vocabulary's words, and
the others must not become noise."""

NOISE = 3.0
"""What a layer reads is off by about so many times what one layer answers wrongly: the errors before it add up."""


def expecting_errors(importances: Mapping[str, Importance], plan: Plan) -> dict[str, Importance]:
    """Importances for fits that expect inputs to be off as much as the layers of the plan are to answer wrongly.

    A weighted fit is exact about what the dense layers see, and careless about all else: a weight that need not bother
    about a direction makes much of what errors of the layers before put there. Noise of one size in all directions,
    NOISE times the mean squared relative error of the layers, rounded to a power of two, speaks for these errors.

    Measured on all-MiniLM-L6-v2 (512 texts; noise in the fits of one plan, then STS-B dev and the agreement with the
    dense model; e: the mean squared relative error):

        kronecker, encoder at 8, e = .35     0 .481 .154   .1 .588 .214   .3 .674 .332   1 .716 .394   3 .664 .358
        svd, encoder at 4, e = .11           0 .802 .579   .3 .805 .581   1 .810 .578   3 .804 .571
        svd, whole model at 8, e = .39       0 .752 .522   .1 .753 .521   .3 .748 .526   1 .750 .541

    It is no rule without exceptions, so it is an option: with this noise Kronecker products go from .698 to .608 at 4
    of the encoder, and at 8 and 19 of the whole model, where answers are wrong by more than their size, from .103 to
    .154 and from .446 to .307. In order (`fit_in_order`), where little noise is left to expect, it does no harm.

    Raises:
        PlanError: the plan expects no error of any layer (all of it was edited).
    """
    errors = [(p.site.num_params, p.expected_error) for p in plan.sites if p.expected_error is not None]
    if not errors:
        raise PlanError("robust fits go by the errors that a plan expects, and this one has none: leave robust out")
    squared = sum(params * error**2 for params, error in errors) / sum(params for params, _ in errors)
    if squared == 0:
        return dict(importances)
    noise = 2.0 ** round(math.log2(NOISE * squared))
    return {name: replace(importance, noise=noise) for name, importance in importances.items()}


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
