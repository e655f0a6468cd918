"""Rules: which decomposition for which site, by name pattern."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from torch import nn

from compresskit.core.cost import Target
from compresskit.core.decomposition import Decomposition
from compresskit.errors import PlanError
from compresskit.machines import machine
from compresskit.surgery.sites import Refusal, Site, Survey

SHOWN_NAMES = 6


@final
@dataclass(frozen=True)
class Rule:
    """Sites whose name matches `pattern` get this decomposition; of several rules the first match wins.

    Args:
        pattern: a glob over the whole dotted name (`*` also matches dots, case matters), or `re:` and a regular
            expression for the whole name. In a model with a head, names match with and without the base
            model's prefix: `encoder.*` finds `bert.encoder.layer.0...` too.
        decomposition: with its options.
    """

    pattern: str
    decomposition: Decomposition


@final
@dataclass(frozen=True)
class Assignment:
    """What the rules make of a model.

    Args:
        chosen: sites and the decomposition of each.
        left: all other matrices, and why they stay dense.
        coverage: share of the model's parameters that any rules could reach.
        target: what layers are to be fast for.
    """

    chosen: tuple[tuple[Site, Decomposition], ...]
    left: tuple[Refusal, ...]
    coverage: float
    target: Target


def assign(
    model: nn.Module,
    survey: Survey,
    rules: Sequence[Rule],
    exclude: Sequence[str] = (),
    *,
    target: Target | None = None,
) -> Assignment:
    """Match rules and exclusions with the sites of a model.

    Args:
        target: None: `cost.TOKENS` tokens on the default machine.

    Raises:
        PlanError: a pattern is malformed or matches nothing, or nothing is left to compress.
    """
    prefix = getattr(model, "base_model_prefix", "")
    matchers = [matcher(rule.pattern, prefix) for rule in rules]
    excluders = [matcher(pattern, prefix) for pattern in exclude]
    _refuse_idle(survey, [rule.pattern for rule in rules], matchers)
    _refuse_idle(survey, exclude, excluders, refused_too=True)
    chosen: list[tuple[Site, Decomposition]] = []
    left = list(survey.refusals)
    for site in survey.sites:
        by = next((p for p, match in zip(exclude, excluders, strict=True) if any(map(match, site.names))), None)
        rule = next((r for r, match in zip(rules, matchers, strict=True) if any(map(match, site.names))), None)
        if by is not None:
            left.append(Refusal(site.name, site.num_params, f"excluded by {by!r}"))
        elif rule is None:
            left.append(Refusal(site.name, site.num_params, "no pattern includes it"))
        else:
            chosen.append((site, rule.decomposition))
    if not chosen:
        raise PlanError(f"nothing is left to compress: {_reasons(left)}")
    return Assignment(tuple(chosen), tuple(left), survey.coverage, target or Target(machine()))


def matcher(pattern: str, prefix: str) -> Callable[[str], bool]:
    """Whether a rule with this pattern means a layer of this name; `prefix` is that of the base model, or empty."""
    if not pattern:
        raise PlanError("an empty pattern matches nothing; use '*' for all layers")
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise PlanError(f"{pattern!r} is not a regular expression: {error}") from error
        return lambda name: any(expression.fullmatch(n) for n in _spellings(name, prefix))
    return lambda name: any(fnmatchcase(n, pattern) for n in _spellings(name, prefix))


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    return (name, name[len(prefix) + 1 :]) if prefix and name.startswith(f"{prefix}.") else (name,)


def _refuse_idle(
    survey: Survey, patterns: Sequence[str], matchers: Sequence[Callable[[str], bool]], *, refused_too: bool = False
) -> None:
    """Raise PlanError for patterns that match no site, nor, with `refused_too`, anything that is left alone anyway."""
    names = [name for site in survey.sites for name in site.names]
    idle = [(p, match) for p, match in zip(patterns, matchers, strict=True) if not any(map(match, names))]
    refused = {p: [r for r in survey.refusals if match(r.name)] for p, match in idle}
    unknown = [p for p, matched in refused.items() if not matched]
    if unknown:
        step = max(1, len(names) // SHOWN_NAMES)
        known = ", ".join(names[::step][:SHOWN_NAMES])
        raise PlanError(
            f"these patterns match no layer: {', '.join(unknown)}. "
            + (
                f"Layers look like: {known}, ..."
                if known
                else f"Nothing here can be replaced: {_reasons(survey.refusals)}"
            )
        )
    if refused and not refused_too:
        matched = [refusal for refusal in survey.refusals if any(refusal in found for found in refused.values())]
        raise PlanError(f"these patterns match only what is left alone: {', '.join(refused)}. {_reasons(matched)}")


def _reasons(refusals: Sequence[Refusal]) -> str:
    shown = "; ".join(f"{r.name or '(the model itself)'}: {r.reason}" for r in refusals[:SHOWN_NAMES])
    more = len(refusals) - SHOWN_NAMES
    return (shown or "the model has no linear layer or embedding") + (f"; and {more} more" if more > 0 else "")
