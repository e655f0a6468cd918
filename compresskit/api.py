"""The Python API: compress a model in memory, or only plan it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compresskit.core.decomposition import Decomposition
from compresskit.core.registry import decomposition
from compresskit.errors import PlanError
from compresskit.hub import check_unquantized, mark_compressed
from compresskit.surgery.apply import Report, apply_
from compresskit.surgery.budget import param_budget
from compresskit.surgery.plan import Plan
from compresskit.surgery.pricing import OnProgress, Planned, make_plan
from compresskit.surgery.rules import Rule, assign
from compresskit.surgery.sites import find_sites

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
    uniform: bool = False,
    allow_slower: bool = False,
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
        speed: expected speed-up of these layers together, at least; expected by a cost model of one machine, so that a
            plan is the same everywhere.
        uniform: layers of one shape get one structure, as the papers do.
        allow_slower: permit structures that are expected to run slower than the dense layer.
        on_progress: called after each layer.
        provenance: plain data that a saved checkpoint keeps, beside our own.

    Returns:
        What was done and what it cost.

    Raises:
        BudgetError: the size or speed cannot be reached; names the highest that can.
        PlanError: a pattern matches nothing, or the plan is for another model.
        WeightError: a weight holds NaN or infinity.
        UnknownNameError: no such method.
        CheckpointError: another library has quantised the model.
    """
    started = time.perf_counter()
    check_unquantized(model)
    planned = _plan(
        model, method, ratio, params, keep, include, exclude, rules, max_macs, speed, uniform, allow_slower, on_progress
    )
    report = apply_(model, planned.plan, analyses=planned.analyses, on_progress=on_progress, started=started)
    mark_compressed(model, provenance)
    return report


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    on_progress: OnProgress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Report:
    """Do what a plan says, one made by `plan` or read by `plan_from_json`. In place; all or nothing, like `compress`.

    Raises:
        PlanError: the plan is for another model.
        WeightError: a weight holds NaN or infinity.
        CheckpointError: another library has quantised the model.
    """
    check_unquantized(model)
    report = apply_(model, plan, on_progress=on_progress)
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
    uniform: bool = False,
    allow_slower: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan:
    """What `compress` would do, as data; arguments and errors are the same. The model is not changed."""
    return _plan(
        model, method, ratio, params, keep, include, exclude, rules, max_macs, speed, uniform, allow_slower, on_progress
    ).plan


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
    uniform: bool,
    allow_slower: bool,
    on_progress: OnProgress | None,
) -> Planned:
    survey = find_sites(model)
    budget = None
    if not (ratio is None and params is None and keep is None):
        budget = param_budget(survey.num_params, ratio=ratio, params=params, keep=keep)
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    if method is not None:
        pairs += [(pattern, method) for pattern in _patterns(include)]
    if not pairs:
        raise PlanError("give a method or rules")
    ordered = [Rule(pattern, decomposition(m) if isinstance(m, str) else m) for pattern, m in pairs]
    return make_plan(
        model,
        assign(model, survey, ordered, _patterns(exclude)),
        num_params=survey.num_params,
        max_params=budget,
        max_macs=max_macs,
        speed=speed,
        uniform=uniform,
        allow_slower=allow_slower,
        on_progress=on_progress,
    )


def _patterns(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)
