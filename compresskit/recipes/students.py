"""From a preset to a student: what becomes of the teacher's weights, decided once and done to every model of its kind.

The stages of a recipe have models with different heads around one encoder. Structures are therefore chosen for the
final model, whose parameters are what a ratio counts, and then given to the encoder of any other.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from compresskit.api import apply, plan
from compresskit.calibration import Calibration
from compresskit.core.decomposition import Decomposition
from compresskit.core.registry import decomposition
from compresskit.errors import OptionError, PlanError, StructureError
from compresskit.recipes.definition import Compressed, Preset, ShapeRule
from compresskit.recipes.smaller import smaller_config, start_at_
from compresskit.surgery.plan import Plan, plan_from_json
from compresskit.surgery.pricing import OnProgress
from compresskit.surgery.rules import matcher
from compresskit.surgery.sites import find_sites

Model = Any
"""A transformers PreTrainedModel, which has no types."""
Calibrate = Callable[[Model], Calibration | None]
"""What the layers of a dense model see; None: nothing was asked to be collected."""
MakeStudent = Callable[[Model], Model]
"""Makes the student of a model: that which it was decided for, or one of its kind with another head. Deterministic."""


def student_maker(
    preset: Preset,
    model: Model,
    *,
    ratio: float | None = None,
    params: int | None = None,
    calibrate: Calibrate = lambda model: None,
    on_progress: OnProgress | None = None,
) -> MakeStudent:
    """Decide what a student of this model looks like, and return what makes it. The model is not changed.

    Args:
        model: dense; with the head that the final student will have.
        ratio: original / student parameters of the whole model; or
        params: parameters of the student; None of both: what the preset says.
        calibrate: what the fits are made for, of each model that a student is made of.

    Raises:
        OptionError: the preset has no size of its own, and none is asked for; or both are.
        StructureError: shapes of the preset do not divide the model's.
        BudgetError: the size cannot be reached.
        PlanError: a pattern matches no layer.
    """
    if ratio is not None and params is not None:
        raise OptionError("ratio and params say the same thing: give one of them")
    student = preset.student
    if ratio is None and params is None:
        ratio = student.ratio
    if isinstance(student, Compressed):
        seen = calibrate(model)
        weighed = seen if student.budget == "outputs" else None
        made = compression_plan(preset, model, ratio=ratio, params=params, calibration=weighed, on_progress=on_progress)
        provenance = {"preset": preset.title}

        def make(like: Model) -> Model:
            return _compressed(made, model, like, seen if like is model else calibrate(like), provenance)

        return make
    if ratio is None and params is None:
        raise _no_size(preset)
    config = smaller_config(model, layer_step=student.layer_step, ratio=ratio, params=params)
    return lambda like: start_at_(type(like)(_with_labels(config, like)), like)


def compression_plan(
    preset: Preset,
    model: Model,
    *,
    ratio: float | None = None,
    params: int | None = None,
    calibration: Calibration | None = None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """The structures that a preset of factorised layers gives a model; arguments and errors as in `student_maker`."""
    student = preset.student
    if not isinstance(student, Compressed):
        raise OptionError(f"preset {preset.title} makes a smaller dense model, which has no plan")
    if ratio is None and params is None:
        if not student.rules:
            raise _no_size(preset)
        rules = _fixed(preset, student, model)
        return plan(
            model,
            rules=rules,
            exclude=student.exclude,
            allow_slower=True,
            calibration=calibration,
            on_progress=on_progress,
        )
    if student.method is None:
        raise OptionError(f"preset {preset.title} has shapes of its own and no method for another ratio")
    return plan(
        model,
        decomposition(student.method, student.options),
        rules={pattern: decomposition(name) for pattern, name in student.methods.items()},
        ratio=ratio,
        params=params,
        exclude=student.exclude,
        uniform=student.uniform,
        allow_slower=student.allow_slower,
        machine=student.machine,
        tokens=student.tokens,
        calibration=calibration,
        on_progress=on_progress,
    )


def _no_size(preset: Preset) -> OptionError:
    return OptionError(f"preset {preset.title} has no size of its own: say which, for instance ratio 7.7")


def _fixed(preset: Preset, student: Compressed, model: Model) -> list[tuple[str, Decomposition]]:
    """The rules of a preset for this model, each with a structure for every layer that it is the first to match.

    Raises:
        StructureError: it has none, because the sizes do not divide.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    rules = [(rule, _scaled(rule, student, model)) for rule in student.rules]
    matches = {rule.pattern: matcher(rule.pattern, prefix) for rule in student.rules}
    used = set()
    for site in find_sites(model).sites:
        found = next(((r, d) for r, d in rules if any(map(matches[r.pattern], site.names))), None)
        if found is None:
            continue
        rule, chosen = found
        used.add(rule.pattern)
        if not list(chosen.menu(site.rows, site.cols, lookup=site.lookup)):
            said = ", ".join(f"{key} = {value}" for key, value in rule.options.items())
            raise StructureError(
                f"preset {preset.title}: {rule.method} with {said} does not divide {site.name}, which is "
                f"{site.rows} x {site.cols}; ask for a ratio instead, or edit the rules of the preset"
            )
    return [(rule.pattern, chosen) for rule, chosen in rules if rule.pattern in used or not rule.optional]


def _scaled(rule: ShapeRule, student: Compressed, model: Model) -> Decomposition:
    options = dict(rule.options)
    if student.rank_hidden_size is not None and "rank" in options:
        rank = int(options["rank"]) * int(model.config.hidden_size) // student.rank_hidden_size
        options["rank"] = str(max(rank, 1))
    return decomposition(rule.method, options)


def _compressed(
    made: Plan, model: Model, like: Model, seen: Calibration | None, provenance: Mapping[str, str]
) -> Model:
    """A copy of `like` with the structures that were chosen for `model`, fitted to the weights of `like`."""
    copied = copy.deepcopy(like)
    fitted = made if like is model else _for_encoder(made, model, copied)
    apply(copied, fitted, calibration=seen, provenance=provenance)
    return copied


def _for_encoder(made: Plan, model: Model, like: Model) -> Plan:
    """The plan for the encoder of `model` as one for that of `like`, whose names may have another prefix.

    Raises:
        PlanError: the encoders have no layer in common.
    """
    data = made.to_json()
    known = {name for site in find_sites(like).sites for name in site.names}
    ours, theirs = _prefix(model), _prefix(like)
    sites = [{**s, "name": theirs + s["name"].removeprefix(ours)} for s in data["sites"] if s["name"].startswith(ours)]
    kept = [site for site in sites if site["name"] in known]
    if not kept:
        raise PlanError(f"{type(like).__name__} has none of the layers that are compressed in {type(model).__name__}")
    return plan_from_json({**data, "sites": kept}, like)


def _prefix(model: Model) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _with_labels(config: Any, like: Model) -> Any:
    """The small config with the labels of the model whose head the student gets."""
    made = copy.deepcopy(config)
    for name in ("id2label", "label2id", "problem_type", "architectures"):
        setattr(made, name, copy.deepcopy(getattr(like.config, name, None)))
    return made
