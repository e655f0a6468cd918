"""The Python API: compress a model in memory, or only plan it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compresskit.calibration import Calibration, Refine, calibrate
from compresskit.calibration.data import Batch
from compresskit.calibration.sequential import fit_in_order
from compresskit.calibration.trials import Judge
from compresskit.calibration.tried import tried_plan
from compresskit.calibration.weights import expecting_errors, importances_of
from compresskit.core.cost import TOKENS, Machine, Target
from compresskit.core.decomposition import Decomposition
from compresskit.core.importance import Importance
from compresskit.core.registry import decomposition
from compresskit.errors import CalibrationError, PlanError
from compresskit.hub import check_unquantized, mark_compressed
from compresskit.machines import machine as find_machine
from compresskit.machines import machine_for
from compresskit.surgery.apply import Report, SiteFit, apply_
from compresskit.surgery.budget import param_budget
from compresskit.surgery.plan import Plan
from compresskit.surgery.pricing import Known, OnProgress, Planned, make_plan
from compresskit.surgery.rules import Assignment, Rule, assign
from compresskit.surgery.sites import Survey, find_sites, site_weight

Method = str | Decomposition


def compress(
    model: nn.Module,
    method: Method | None = None,
    *,
    ratio: float | None = None,
    params: int | None = None,
    keep: float | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    rules: Sequence[tuple[str, Method]] | Mapping[str, Method] = (),
    max_macs: int | None = None,
    speed: float | None = None,
    machine: str | Path | Machine | None = None,
    tokens: int = TOKENS,
    uniform: bool = False,
    allow_slower: bool = False,
    calibration: Calibration | None = None,
    sensitivities: Mapping[str, float] | None = None,
    search: Sequence[Batch] | Judge | None = None,
    compare: Sequence[Batch] | Judge | None = None,
    robust: bool = False,
    samples: Sequence[Batch] | None = None,
    sequential: bool = False,
    refine: Refine | None = None,
    on_progress: OnProgress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Replace layers of `model` by factorised ones so that the whole model is `ratio` times smaller. In place.

    Everything is fitted and checked before the first layer is swapped: an error leaves the model as it was. A
    transformers model can then be saved with `save_pretrained` and opened with `from_pretrained`.

    Args:
        model: any `nn.Module`.
        method: name of a decomposition (`"kronecker"`) or one with options (`Kronecker(terms=2)`).
        ratio: original / compressed parameters of the whole model, every parameter counted once. Alternatives:
        params: parameters that are left, or
        keep: compressed / original. Without all three, `max_macs` or `speed` must be given, or the options leave one
            structure per layer.
        include: name patterns that `method` applies to; globs, or `re:` and a regular expression.
        exclude: name patterns that stay dense, whatever else says.
        rules: pairs of pattern and method that come before `method`; the first match wins.
        max_macs: multiply-adds per token that the layers which the rules choose may take together.
        speed: expected speed-up of these layers together, at least; expected by the cost model of the machine, so that
            a plan is the same wherever it is made.
        machine: where the model is to be fast: one of `machines()`, or a file of the same form. Unless `allow_slower`,
            no structure is chosen that is expected to run slower than dense there. None: `cpu`, or `cpu-bf16` for a
            model in bfloat16.
        tokens: that the model will see at a time, texts times their length; 1 for a text that is generated.
        uniform: layers of one shape get one structure, as the papers do.
        allow_slower: permit structures that are expected to run slower than the dense layer.
        calibration: what the layers see, from `calibrate`: errors are then those of the layers' outputs on the samples,
            for the budget and for the fits, and biases take up the mean error. Methods with a data-aware fit only.
        sensitivities: by layer name, how much its squared relative error counts, from `measure_sensitivities`; by
            default as much as it has parameters.
        search: batches of samples to search on by how much more or less layers of each shape should count than that:
            ten models or so are compressed, and that which answers nearest to the dense one on these is made. Or a
            function that says of a compressed model how wrong it is, at least 0, to go by that.
        compare: where the method chooses between several (`auto`): batches of samples on which its plan is compared
            with plans of one method alone, those that are expected to lose hardly more. One whose model answers
            notably nearer to the dense one is made instead; the report says by how much each was off. Or such a
            function: the plan is made whose model it says is least wrong. With `search` as well, what layers count is
            searched for each of these plans.
        robust: fit for inputs that are off as much as the layers before are expected to answer wrongly. Structures are
            chosen as without. Worth a try where much is lost; measured, it helps some sizes and hurts others.
        samples: batches, as `list(read_batches(...))`, that `sequential` and `refine` run on; without `calibration`,
            the model is calibrated on them.
        sequential: fit layer after layer to the dense answers on what the compressed layers before give. About eight
            more passes over the samples, and the memory of a second model.
        refine: then train the factors of each layer of the transformer to answer as the dense one, without labels.
        on_progress: called after each layer.
        provenance: plain data that a saved checkpoint keeps, beside our own.

    Returns:
        What was done and what it cost.

    Raises:
        BudgetError: the size or speed cannot be reached; names the highest that can.
        PlanError: a pattern matches nothing, or the plan is for another model.
        WeightError: a weight holds NaN or infinity.
        UnknownNameError: no such method or machine.
        CalibrationError: the calibration was made for another model.
        OptionError: a method has no data-aware fit; the file of the machine is malformed, or tokens are not at least 1.
        CheckpointError: another library has quantised the model.
    """
    started = time.perf_counter()
    check_unquantized(model)
    calibration, importances = _importances(
        model, calibration, samples, robust=robust, sequential=sequential, refine=refine
    )
    planned, searched = _plan(
        model,
        method,
        ratio,
        params,
        keep,
        include,
        exclude,
        rules,
        max_macs,
        speed,
        machine,
        tokens,
        uniform,
        allow_slower,
        importances,
        sensitivities,
        search,
        compare,
        robust,
        on_progress,
    )
    analyses = planned.analyses
    if robust:
        importances, analyses = expecting_errors(importances, planned.plan), {}
    report = apply_(
        model,
        planned.plan,
        analyses=analyses,
        importances=importances,
        fits=_fits(model, planned.plan, importances, samples, sequential, refine, on_progress) or searched,
        calibration=_facts(calibration, robust=robust, sequential=sequential, refine=refine),
        on_progress=on_progress,
        started=started,
    )
    mark_compressed(model, provenance)
    return report


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Calibration | None = None,
    robust: bool = False,
    samples: Sequence[Batch] | None = None,
    sequential: bool = False,
    refine: Refine | None = None,
    on_progress: OnProgress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Do what a plan says, one made by `plan` or read by `plan_from_json`. In place; all or nothing, like `compress`.

    Args:
        calibration, robust, samples, sequential, refine: fit to data, as in `compress`.

    Raises:
        PlanError: the plan is for another model.
        WeightError: a weight holds NaN or infinity.
        CheckpointError: another library has quantised the model.
    """
    check_unquantized(model)
    started = time.perf_counter()
    calibration, importances = _importances(
        model, calibration, samples, robust=robust, sequential=sequential, refine=refine
    )
    if robust:
        importances = expecting_errors(importances, plan)
    report = apply_(
        model,
        plan,
        importances=importances,
        fits=_fits(model, plan, importances, samples, sequential, refine, on_progress),
        calibration=_facts(calibration, robust=robust, sequential=sequential, refine=refine),
        on_progress=on_progress,
        started=started,
    )
    mark_compressed(model, provenance)
    return report


def plan(
    model: nn.Module,
    method: Method | None = None,
    *,
    ratio: float | None = None,
    params: int | None = None,
    keep: float | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    rules: Sequence[tuple[str, Method]] | Mapping[str, Method] = (),
    max_macs: int | None = None,
    speed: float | None = None,
    machine: str | Path | Machine | None = None,
    tokens: int = TOKENS,
    uniform: bool = False,
    allow_slower: bool = False,
    calibration: Calibration | None = None,
    sensitivities: Mapping[str, float] | None = None,
    search: Sequence[Batch] | Judge | None = None,
    compare: Sequence[Batch] | Judge | None = None,
    robust: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan:
    """What `compress` would do, as data; arguments and errors are the same. The model is not changed."""
    _, importances = _importances(model, calibration, None, robust=robust)
    return _plan(
        model,
        method,
        ratio,
        params,
        keep,
        include,
        exclude,
        rules,
        max_macs,
        speed,
        machine,
        tokens,
        uniform,
        allow_slower,
        importances,
        sensitivities,
        search,
        compare,
        robust,
        on_progress,
    )[0].plan


def _plan(
    model: nn.Module,
    method: Method | None,
    ratio: float | None,
    params: int | None,
    keep: float | None,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    rules: Sequence[tuple[str, Method]] | Mapping[str, Method],
    max_macs: int | None,
    speed: float | None,
    machine: str | Path | Machine | None,
    tokens: int,
    uniform: bool,
    allow_slower: bool,
    importances: Mapping[str, Importance],
    sensitivities: Mapping[str, float] | None,
    search: Sequence[Batch] | Judge | None,
    compare: Sequence[Batch] | Judge | None,
    robust: bool,
    on_progress: OnProgress | None,
) -> tuple[Planned, Mapping[str, SiteFit] | None]:
    """The plan; after trials its fits by site name, too."""
    survey = find_sites(model)
    target = Target(machine_for(_dtype(model, survey)) if machine is None else find_machine(machine), tokens)
    budget = None
    if not (ratio is None and params is None and keep is None):
        budget = param_budget(survey.num_params, ratio=ratio, params=params, keep=keep)
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    if method is not None:
        pairs += [(pattern, method) for pattern in _patterns(include)]
    if not pairs:
        raise PlanError("give a method or rules")
    ordered = [Rule(pattern, decomposition(m) if isinstance(m, str) else m) for pattern, m in pairs]
    assignment, known = assign(model, survey, ordered, _patterns(exclude), target=target), Known()

    def plan_for(assignment: Assignment, sensitivities: Mapping[str, float] | None) -> Planned:
        return make_plan(
            model,
            assignment,
            num_params=survey.num_params,
            max_params=budget,
            max_macs=max_macs,
            speed=speed,
            uniform=uniform,
            allow_slower=allow_slower,
            importances=importances,
            sensitivities=sensitivities,
            known=known,
            on_progress=on_progress,
        )

    found = tried_plan(
        model,
        assignment,
        plan_for,
        importances,
        sensitivities,
        search=search,
        compare=compare,
        robust=robust,
        on_progress=on_progress,
    )
    return (plan_for(assignment, sensitivities), None) if found is None else (found.planned, found.fits)


def _dtype(model: nn.Module, survey: Survey) -> str:
    """Of the largest weight that could be replaced."""
    largest = max(survey.sites, key=lambda site: site.num_params, default=None)
    return "" if largest is None else str(site_weight(model, largest).dtype).removeprefix("torch.")


def _importances(
    model: nn.Module,
    calibration: Calibration | None,
    samples: Sequence[Batch] | None,
    *,
    robust: bool = False,
    sequential: bool = False,
    refine: Refine | None = None,
) -> tuple[Calibration | None, dict[str, Importance]]:
    """The calibration, collected if there is none yet, and what it says about each site."""
    if samples is None and (sequential or refine is not None):
        raise CalibrationError("sequential and refine run on samples: give samples=list(read_batches(...))")
    if calibration is None and samples is not None:
        calibration = calibrate(model, samples, samples=sum(len(next(iter(batch.values()))) for batch in samples) or 1)
    if robust and calibration is None:
        raise CalibrationError("robust fits are fits to what layers see: give calibration= or samples=")
    return calibration, {} if calibration is None else importances_of(calibration, model)


def _fits(
    model: nn.Module,
    plan: Plan,
    importances: Mapping[str, Importance],
    samples: Sequence[Batch] | None,
    sequential: bool,
    refine: Refine | None,
    on_progress: OnProgress | None,
) -> dict[str, SiteFit] | None:
    """Fits that follow the order of the layers; None if none are asked for."""
    if samples is None or not (sequential or refine is not None):
        return None
    return fit_in_order(
        model, plan, samples, importances, compensate=sequential, refine=refine, on_progress=on_progress
    )


def _facts(
    calibration: Calibration | None, *, robust: bool, sequential: bool, refine: Refine | None
) -> dict[str, Any] | None:
    if calibration is None:
        return None
    how = {"robust": robust, "sequential": sequential, "refine_epochs": None if refine is None else refine.epochs}
    return {**calibration.to_json(), **how, "warnings": calibration.warnings()}


def _patterns(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
