"""Sequential fits: each layer is fitted to what the dense one answers, on what the compressed ones before it give.

A layer of the dense model answers W x with its own input x; the same layer of the compressed model reads x' instead.
The weight that answers nearest to W x on x' is W* = W E[x x'^T] E[x' x'^T]^-1, and for any other weight V the error is
that of W* plus tr((V - W*) E[x' x'^T] (V - W*)^T): so W* is fitted, weighted by the second moment of x'. A bias
takes up the difference of the means, and all moments are then about the means.

Sources: GPTQ (Frantar et al., ICLR 2023) and SVD-LLM (Wang et al., ICLR 2025) calibrate each layer on the outputs of
the compressed ones before it; the closed form is least squares.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from compresskit.calibration.blocks import Stack, first_hidden, input_of, readers, record
from compresskit.calibration.collect import undisturbed
from compresskit.calibration.data import Batch
from compresskit.calibration.refine import Refine, refine_
from compresskit.core.decomposition import Fitted, as_matrix, relative_error
from compresskit.core.importance import Importance
from compresskit.errors import CalibrationError
from compresskit.surgery.apply import SiteFit, fit_site, modules_of
from compresskit.surgery.layout import swap_
from compresskit.surgery.plan import Plan, PlannedSite
from compresskit.surgery.pricing import OnProgress, Progress
from compresskit.surgery.sites import find_sites, site_weight

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to the second moment before it is inverted, as in GPTQ; it draws W*
towards W where samples say little."""

UNSEEN_NOISE = 0.1
"""Noise of robust fits here, whatever the plan expects: what the compressed layers before do to other texts than the
samples; what they do to these is seen. On all-MiniLM-L6-v2 Kronecker products keep more with it where much is lost,
STS-B .486 to .541 for the whole model at 19, .764 to .771 for the encoder at 8, and the SVD as much as without."""


def fit_in_order(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    importances: Mapping[str, Importance],
    *,
    compensate: bool = True,
    refine: Refine | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, SiteFit]:
    """Fits of all sites of a plan by name, in forward order. The model is only read: the work is done on a copy.

    One layer of the transformer at a time: for each group of sites that read one tensor, both models run the layer as
    far as that tensor on all batches. In all, that takes about as long as eight passes over the samples, and the memory
    of a second model and of three hidden states of every token.

    Args:
        batches: samples, as `read_batches` gives them.
        importances: by site name; sites outside the layers are fitted with them, and all are if not `compensate`.
        compensate: false: weighted fits on the dense model's inputs, for refinement alone.
        refine: then optimise each layer's output as a whole.
        on_progress: called after each site, and after each epoch of refinement.

    Raises:
        CalibrationError: the model has no single stack of layers, or there is no sample.
    """
    if refine is not None and any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise CalibrationError("refinement trains in float32; load the model in it (--dtype float32)")
    stack = record(model, batches, find_sites(model))
    student = copy.deepcopy(model)
    work = _Work(model, student, stack, plan, dict(importances), on_progress)
    with undisturbed(student), undisturbed(model):
        for planned in plan.sites:
            if all(stack.block_of(name) is None for name in planned.site.names):
                work.keep(planned, work.weighted(planned))
        ours, theirs = first_hidden(student, stack), list(stack.hidden)
        for index in range(len(stack.names)):
            work.fit_block(index, ours, theirs, compensate=compensate)
            dense, small = (m.get_submodule(stack.names[index]) for m in (model, student))
            with torch.no_grad():
                theirs = [stack.run(dense, index, b, hidden) for b, hidden in enumerate(theirs)]
            if refine is not None:
                refined = refine_(small, stack, index, ours, theirs, refine, on_progress)
                work.take(index, refined)
            with torch.no_grad():
                ours = [stack.run(small, index, b, hidden) for b, hidden in enumerate(ours)]
    return work.fits


@final
@dataclass
class _Work:
    """The copy that is compressed as the fits are made, and the fits."""

    model: nn.Module
    student: nn.Module
    stack: Stack
    plan: Plan
    importances: dict[str, Importance]
    on_progress: OnProgress | None

    def __post_init__(self) -> None:
        self.fits: dict[str, SiteFit] = {}

    def weighted(self, planned: PlannedSite) -> SiteFit:
        return fit_site(self.model, planned, self.importances.get(planned.site.name))

    def keep(self, planned: PlannedSite, fit: SiteFit) -> None:
        """Put a fit into the copy."""
        name = planned.site.name
        self.fits[name] = fit
        swap_(self.student, modules_of(self.student, planned, fit.fitted))
        if fit.bias_change is not None:
            with torch.no_grad():
                for module in (self.student.get_submodule(n) for n in planned.site.names):
                    if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                        bias.add_(fit.bias_change.to(bias))
        if self.on_progress is not None:
            error = fit.fitted.relative_error if fit.fitted.weighted_error is None else fit.fitted.weighted_error
            self.on_progress(Progress("fit", name, len(self.fits), len(self.plan.sites), error))

    def fit_block(self, index: int, ours: Sequence[Tensor], theirs: Sequence[Tensor], *, compensate: bool) -> None:
        """Fit the sites of one block, those that read one tensor together."""
        block = f"{self.stack.names[index]}."
        here = {p.site.name.removeprefix(block): p for p in self.plan.sites if p.site.name.startswith(block)}
        dense, small = (m.get_submodule(block[:-1]) for m in (self.model, self.student))
        with torch.no_grad():
            groups = readers(dense, list(here), lambda: self.stack.run(dense, index, 0, theirs[0]))
            for group in groups:
                alone = [here[name] for name in group if group.count(name) == 1 and len(here[name].site.names) == 1]
                moments = None
                if compensate and alone:
                    moments = self._moments(index, dense, small, group[0], ours, theirs)
                for planned in {here[name].site.name: here[name] for name in group}.values():
                    fit = self.weighted(planned)
                    if moments is not None and planned in alone:
                        fit = self._compensated(planned, moments)
                    self.keep(planned, fit)
        reached = {name for group in groups for name in group}
        for name in here.keys() - reached:  # an expert that the first batch does not choose
            self.keep(here[name], self.weighted(here[name]))

    def _moments(
        self,
        index: int,
        dense: nn.Module,
        small: nn.Module,
        name: str,
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
    ) -> "_Pair | None":
        """Moments of the inputs of one layer in both models; None where they read different numbers of tokens."""
        full_name = f"{self.stack.names[index]}.{name}"
        pair: _Pair | None = None
        for b, masks in enumerate(self.stack.masks):
            x, y = (
                input_of(block, name, _runner(self.stack, block, index, b, hidden[b]))
                for block, hidden in ((dense, theirs), (small, ours))
            )
            if x.shape != y.shape:
                return None
            rows, _ = masks.real(full_name, tuple(x.shape[:-1]))
            flat = [t.reshape(-1, t.shape[-1]).float() for t in (x, y)]
            if rows is not None:
                flat = [t[rows.to(t.device)] for t in flat]
            pair = pair or _Pair.empty(flat[0])
            pair.add(*flat)
        return pair

    def _compensated(self, planned: PlannedSite, pair: "_Pair") -> SiteFit:
        site = planned.site
        weight = as_matrix(site_weight(self.model, site), f"the weight of {site.name!r}")
        bias = getattr(self.model.get_submodule(site.name), "bias", None)
        centred = isinstance(bias, Tensor)
        cross, ours, dense = pair.second(centred=centred)
        target = weight.double() @ cross  # (rows, cols)
        damped = DAMPING * float(ours.diagonal().mean()) or 1.0
        identity = torch.eye(len(ours), dtype=ours.dtype, device=ours.device) * damped
        wanted = torch.linalg.solve(ours + identity, (target + damped * weight.double()).T).T.to(weight.dtype)
        known = self.importances.get(site.name)
        rows, robust = (None, False) if known is None else (known.rows, known.noise > 0)
        importance = Importance(cols=ours.float(), rows=rows, noise=UNSEEN_NOISE if robust else 0.0)
        fitted = planned.decomposition.fit(wanted, structure=planned.structure, importance=importance)
        small = planned.structure.dense(fitted.factors)
        error = _output_error(weight.double(), small.double(), cross, ours, dense)
        fitted = replace(fitted, relative_error=relative_error(weight, small), weighted_error=error)
        if not centred:
            return SiteFit(fitted, None)
        theirs_mean, ours_mean = pair.means()
        change = weight.double() @ theirs_mean - small.double() @ ours_mean
        return SiteFit(fitted, change.to(weight.dtype))

    def take(self, index: int, refined: Mapping[str, nn.Module]) -> None:
        """Read refined factors and biases of a block back into the fits."""
        for planned in self.plan.sites:
            name = planned.site.name
            if name not in refined:
                continue
            module = refined[name]
            factors = {key: factor.detach().clone() for key, factor in module.factors().items()}  # type: ignore[operator]
            weight = as_matrix(site_weight(self.model, planned.site))
            old = self.fits[name].fitted
            small = planned.structure.dense(factors).to(weight.dtype)
            importance = self.importances.get(name)
            weighted = old.weighted_error
            if importance is not None:
                energy = importance.squared_norm(weight)
                weighted = math.sqrt(importance.squared_norm(weight - small) / energy) if energy else 0.0
            fitted = Fitted(planned.structure, factors, relative_error(weight, small), weighted)
            dense_bias = getattr(self.model.get_submodule(name), "bias", None)
            bias = getattr(module, "bias", None)
            change = None if bias is None or dense_bias is None else (bias - dense_bias).detach()
            self.fits[name] = SiteFit(fitted, change)


@final
@dataclass
class _Pair:
    """Sums over tokens of what one layer reads in the dense model, x, and in the compressed one, y."""

    cross: Tensor
    ours: Tensor
    dense: Tensor
    first_dense: Tensor
    first_ours: Tensor
    tokens: int

    @staticmethod
    def empty(like: Tensor) -> "_Pair":
        width = like.shape[1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=like.device)

        squares = (zeros(width, width), zeros(width, width), zeros(width, width))
        return _Pair(*squares, zeros(width), zeros(width), 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        self.cross += x.T @ y
        self.ours += y.T @ y
        self.dense += x.T @ x
        self.first_dense += x.sum(0, dtype=torch.float64)
        self.first_ours += y.sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def means(self) -> tuple[Tensor, Tensor]:
        return self.first_dense / self.tokens, self.first_ours / self.tokens

    def second(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """E[x y^T], E[y y^T], E[x x^T], about the means if asked."""
        cross, ours, dense = self.cross / self.tokens, self.ours / self.tokens, self.dense / self.tokens
        if not centred:
            return cross, ours, dense
        x, y = self.means()
        return cross - torch.outer(x, y), ours - torch.outer(y, y), dense - torch.outer(x, x)


def _output_error(weight: Tensor, small: Tensor, cross: Tensor, ours: Tensor, dense: Tensor) -> float:
    """sqrt(E|W x - V y|^2 / E|W x|^2)."""
    energy = float(((weight @ dense) * weight).sum())
    error = energy - 2 * float(((weight @ cross) * small).sum()) + float(((small @ ours) * small).sum())
    return math.sqrt(max(error, 0.0) / energy) if energy > 0 else 0.0


def _runner(stack: Stack, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Callable[[], Tensor]:
    return lambda: stack.run(block, index, batch, hidden)
