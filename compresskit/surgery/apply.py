"""Applying a plan: fit everything, check everything, then swap. A failure leaves the model as it was."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.core.cost import Target
from compresskit.core.decomposition import Analysis, Fitted, as_matrix, module_from, squared_norm
from compresskit.core.importance import Importance
from compresskit.core.modules import FactorizedEmbedding
from compresskit.errors import PlanError, WeightError
from compresskit.surgery.layout import swap_
from compresskit.surgery.parallel import map_in_threads
from compresskit.surgery.plan import FrontPoint, Plan, PlannedSite, group_name
from compresskit.surgery.pricing import OnProgress, Progress
from compresskit.surgery.sites import Refusal, count_params, find_sites, site_weight


@final
@dataclass(frozen=True)
class SiteFit:
    """A fit of one site, and the mean error of the output (rows,), which the biases of its layers take up, or None."""

    fitted: Fitted
    bias_change: Tensor | None


@final
@dataclass(frozen=True)
class SiteReport:
    """What became of one site: its new structure and the error that was measured after the fit.

    Times are expected, for the target of the report. `slower`: more multiply-adds
    than dense, or expected to take notably longer. `weighted_error`: of the layer's output on the samples, relative;
    None where it was fitted without data.
    """

    name: str
    names: tuple[str, ...]
    method: str
    structure: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    time_ns_before: int
    time_ns_after: int
    slower: bool
    expected_error: float | None
    relative_error: float
    weighted_error: float | None = None


@final
@dataclass(frozen=True)
class Report:
    """What a compression did. Every count takes tied parameters once.

    Args:
        sites: what was replaced.
        left: weight matrices that stayed dense, and why.
        target: of the plan: how many tokens on which machine times are expected for.
        coverage: share of the parameters that is in replaceable layers, whether they were chosen or not.
        params_before, params_after: whole model.
        embedding_params_before, embedding_params_after: in embedding tables and what replaced them.
        bytes_before, bytes_after: of the parameters in memory.
        relative_error: over all replaced weights together (Frobenius).
        gap: of the plan: proven distance from the least loss that the priced structures reach in the budget.
        time_s: analysing, choosing and fitting.
        weighted_error: root mean square of the sites' weighted errors, each as often as it has parameters; None where
            no site was fitted to data.
        corrected_biases: biases that took up the mean error of their layer.
        calibration: facts and warnings about the data that was fitted to, plain; None without.
        front: of the plan: what other sizes would lose.
        compared: of the plan: what whole models of it and of others were off by.
        searched: of the plan: how much more or less errors of layers of some shapes count than without a search.
    """

    sites: tuple[SiteReport, ...]
    left: tuple[Refusal, ...]
    target: Target
    coverage: float
    params_before: int
    params_after: int
    embedding_params_before: int
    embedding_params_after: int
    bytes_before: int
    bytes_after: int
    relative_error: float
    gap: float | None
    time_s: float
    weighted_error: float | None = None
    corrected_biases: int = 0
    calibration: Mapping[str, Any] | None = None
    front: tuple[FrontPoint, ...] = ()
    compared: tuple[tuple[str, float], ...] = ()
    searched: tuple[tuple[str, float], ...] = ()

    @property
    def ratio(self) -> float:
        """Original / compressed parameters of the whole model."""
        return self.params_before / self.params_after

    @property
    def site_ratio(self) -> float:
        """The same, of the replaced weights alone."""
        return sum(s.params_before for s in self.sites) / sum(s.params_after for s in self.sites)

    @property
    def body_ratio(self) -> float:
        """The same, of everything but the embedding tables."""
        before = self.params_before - self.embedding_params_before
        return before / max(self.params_after - self.embedding_params_after, 1) if before else 1.0

    @property
    def bytes_ratio(self) -> float:
        """Bytes of the parameters before / after."""
        return self.bytes_before / self.bytes_after

    @property
    def macs_ratio(self) -> float:
        """Multiply-adds per token in the replaced layers before / after; 1 if nothing is multiplied."""
        after = sum(s.macs_after for s in self.sites)
        return sum(s.macs_before for s in self.sites) / after if after else 1.0

    @property
    def expected_speedup(self) -> float:
        """Expected time of the replaced layers while dense / now."""
        return sum(s.time_ns_before for s in self.sites) / sum(s.time_ns_after for s in self.sites)

    def by_group(self) -> dict[str, list[SiteReport]]:
        """Sites by name with layer numbers replaced by `*`."""
        groups: dict[str, list[SiteReport]] = {}
        for site in self.sites:
            groups.setdefault(group_name(site.name), []).append(site)
        return groups

    def to_json(self) -> dict[str, Any]:
        """Plain data, ratios included."""
        ratios = ("ratio", "site_ratio", "body_ratio", "bytes_ratio", "macs_ratio", "expected_speedup")
        plain = {**dataclasses.asdict(self), "compared": dict(self.compared), "searched": dict(self.searched)}
        plain["target"] = {"tokens": self.target.tokens, "machine": self.target.machine.name, "about": str(self.target)}
        return {**{name: getattr(self, name) for name in ratios}, **plain}


def apply_(
    model: nn.Module,
    plan: Plan,
    *,
    analyses: Mapping[str, Analysis] | None = None,
    importances: Mapping[str, Importance] | None = None,
    fits: Mapping[str, SiteFit] | None = None,
    calibration: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    started: float | None = None,
) -> Report:
    """Replace the sites of a plan by fitted modules. Changes the model, and only after everything has succeeded.

    Args:
        analyses: by site name, from `make_plan` of this very model; what is missing is computed here.
        importances: by site name; one with a mean has the bias take up the mean error.
        fits: by site name, made already (sequential fits); what is missing is fitted here.
        calibration: for the report.
        started: `time.perf_counter()` when the work began, for the report; by default now.

    Raises:
        WeightError: a weight or a fitted factor holds NaN or infinity; names the site.
        PlanError: the plan was made for another model.
    """
    started = time.perf_counter() if started is None else started
    before, before_bytes, before_embedding = count_params(model), _num_bytes(model), _embedding_params(model)
    if before != plan.num_params:
        raise PlanError(f"the plan was made for a model of {plan.num_params:,} parameters, this one has {before:,}")
    _refuse_strangers(model, plan)
    modules: dict[str, nn.Module] = {}
    reports: list[SiteReport] = []
    changes: dict[nn.Parameter, Tensor] = {}

    def ready(planned: PlannedSite) -> _Ready:
        name = planned.site.name
        importance, analysis = (importances or {}).get(name), (analyses or {}).get(name)
        return _ready(model, planned, (fits or {}).get(name) or fit_site(model, planned, importance, analysis))

    def done(site: _Ready) -> None:
        modules.update(site.modules)
        changes.update(site.bias_changes)
        reports.append(site.report)
        if on_progress is not None and fits is None:
            error = site.report.relative_error if site.report.weighted_error is None else site.report.weighted_error
            on_progress(Progress("fit", site.report.name, len(reports), len(plan.sites), error))

    device = next(model.parameters()).device
    sites = map_in_threads(ready, plan.sites, device=device, on_done=done, size=lambda planned: planned.site.num_params)
    swap_(model, modules)
    with torch.no_grad():
        for bias, change in changes.items():
            bias.add_(change)
    energy = sum(site.norm**2 for site in sites)
    lost = sum((site.norm * site.report.relative_error) ** 2 for site in sites)
    return Report(
        sites=tuple(reports),
        left=plan.left,
        target=plan.target,
        coverage=plan.coverage,
        params_before=before,
        params_after=count_params(model),
        embedding_params_before=before_embedding,
        embedding_params_after=_embedding_params(model),
        bytes_before=before_bytes,
        bytes_after=_num_bytes(model),
        relative_error=math.sqrt(lost / energy) if energy else 0.0,
        gap=plan.gap,
        time_s=time.perf_counter() - started,
        weighted_error=_weighted_error(reports),
        corrected_biases=len(changes),
        calibration=calibration,
        front=plan.front,
        compared=plan.compared,
        searched=plan.searched,
    )


def _weighted_error(reports: Sequence[SiteReport]) -> float | None:
    weighted = [(site.params_before, site.weighted_error) for site in reports if site.weighted_error is not None]
    total = sum(params for params, _ in weighted)
    return math.sqrt(sum(params * error**2 for params, error in weighted) / total) if total else None


def _refuse_strangers(model: nn.Module, plan: Plan) -> None:
    known = set(find_sites(model).sites)
    strangers = [planned.site for planned in plan.sites if planned.site not in known]
    if strangers:
        named = ", ".join(f"{site.name} ({site.rows} x {site.cols})" for site in strangers[:3])
        raise PlanError(
            f"the plan was made for another model, or this one has changed since: {len(strangers)} of its "
            f"{len(plan.sites)} sites cannot be replaced here as planned: {named}{', ...' if strangers[3:] else ''}"
        )


def fit_site(
    model: nn.Module, planned: PlannedSite, importance: Importance | None, analysis: Analysis | None = None
) -> SiteFit:
    """The fit of one site. Reads the model only.

    Raises:
        WeightError: the weight or what was fitted holds NaN or infinity; names the site.
    """
    site, decomposition = planned.site, planned.decomposition
    matrix = as_matrix(site_weight(model, site), f"the weight of {site.name!r}")
    analysis = analysis or decomposition.analyse_for(matrix, importance)
    fitted = decomposition.fit_analysed(matrix, analysis, planned.structure, importance)
    analysis.shrink()  # those of all sites are held until the last is fitted
    if importance is None or importance.mean is None:
        return SiteFit(fitted, None)
    return SiteFit(fitted, fitted.bias_change(matrix, importance.mean))


@final
@dataclass(frozen=True)
class _Ready:
    """A fitted site: its modules by name, what its biases gain, what is reported of it, the norm of its weight."""

    modules: Mapping[str, nn.Module]
    bias_changes: Mapping[nn.Parameter, Tensor]
    report: SiteReport
    norm: float


def _ready(model: nn.Module, planned: PlannedSite, fit: SiteFit) -> _Ready:
    _check_finite(planned, fit)
    return _Ready(
        modules_of(model, planned, fit.fitted),
        _bias_changes(model, planned, fit),
        _site_report(planned, fit.fitted),
        math.sqrt(squared_norm(as_matrix(site_weight(model, planned.site)))),
    )


def _check_finite(planned: PlannedSite, fit: SiteFit) -> None:
    name = planned.site.name
    if not math.isfinite(fit.fitted.relative_error):
        raise WeightError(f"fitting {name!r} with {planned.structure} gave values that are not finite")
    if fit.bias_change is not None and not torch.isfinite(fit.bias_change).all():
        raise WeightError(f"the mean input of {name!r} gives a bias that is not finite")


def modules_of(model: nn.Module, planned: PlannedSite, fitted: Fitted) -> dict[str, nn.Module]:
    """A module for each name of the site; tied ones hold the same parameters."""
    olds = {name: model.get_submodule(name) for name in planned.site.names}
    weight = next(iter(olds.values())).weight
    assert isinstance(weight, Tensor)
    factors = {
        name: nn.Parameter(tensor.to(dtype=weight.dtype, device=weight.device), weight.requires_grad)
        for name, tensor in fitted.factors.items()
    }
    if not all(torch.isfinite(factor).all() for factor in factors.values()):
        raise WeightError(
            f"factors of {planned.site.name!r} are too large for {weight.dtype}; load the model in float32"
        )
    return {name: module_from(fitted.structure, factors, old) for name, old in olds.items()}


def _bias_changes(model: nn.Module, planned: PlannedSite, fit: SiteFit) -> dict[nn.Parameter, Tensor]:
    """What is to be added to the biases of the site's layers."""
    change = fit.bias_change
    if change is None:
        return {}
    biases = [getattr(model.get_submodule(name), "bias", None) for name in planned.site.names]
    return {bias: change.to(bias.device, bias.dtype) for bias in biases if isinstance(bias, nn.Parameter)}


def _site_report(planned: PlannedSite, fitted: Fitted) -> SiteReport:
    return SiteReport(
        name=planned.site.name,
        names=planned.site.names,
        method=planned.decomposition.name,
        structure=str(planned.structure),
        params_before=planned.site.num_params,
        params_after=planned.params,
        macs_before=planned.dense_macs,
        macs_after=planned.macs,
        time_ns_before=planned.dense_time_ns,
        time_ns_after=planned.time_ns,
        slower=planned.slower,
        expected_error=planned.expected_error,
        relative_error=fitted.relative_error,
        weighted_error=fitted.weighted_error,
    )


def _embedding_params(model: nn.Module) -> int:
    """Parameters in embedding tables, tied ones once."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | FactorizedEmbedding)]
    return sum({id(p): p.numel() for table in tables for p in table.parameters()}.values())


def _num_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
