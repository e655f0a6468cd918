"""Markdown tables from results: for each suite one table per kind of experiment, and what it was measured on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments import kinds
from benchmarks.runner import read_result, state
from benchmarks.suites import Entry


def report_suite(entries: Sequence[Entry], results: Path) -> str:
    """The report of one suite: tables of its current results, then what is missing or was measured otherwise."""
    states = {entry.name: state(entry, results) for entry in entries}
    current = [read_result(entry.path(results)) for entry in entries if states[entry.name] == "current"]
    blocks = [f"## {entries[0].suite}"]
    for kind in dict.fromkeys(result["configuration"]["kind"] for result in current):
        blocks.append(_table([result for result in current if result["configuration"]["kind"] == kind]))
    blocks += _circumstances(current)
    reasons = {f"{part}: {reason}" for result in current for part, reason in result["skipped"].items()}
    blocks += [f"Skipped: {'; '.join(sorted(reasons))}."] if reasons else []
    for label, wanted in (("Not measured yet", "missing"), ("Measured with another configuration", "changed")):
        names = [name for name, what in states.items() if what == wanted]
        blocks += [f"{label}: {', '.join(names)}."] if names else []
    return "\n\n".join(blocks)


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    kind = kinds()[results[0]["configuration"]["kind"]]
    rows = [{"experiment": r["experiment"]} | kind.row(r["configuration"], r["figures"]) for r in results]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *([row.get(t, "") for t in titles] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _circumstances(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each machine, set of versions and commit, with the experiments that it applies to."""
    groups: dict[str, list[str]] = {}
    for result in results:
        groups.setdefault(_circumstance(result), []).append(result["experiment"])
    if len(groups) == 1:
        return [f"Measured on {next(iter(groups))}."]
    return [f"Measured on {line}: {', '.join(names)}." for line, names in groups.items()]


def _circumstance(result: Mapping[str, Any]) -> str:
    machine, commit = result["hardware"], result["commit"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores ({machine['threads']} used), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    if commit is None:
        return f"{where}; {versions}; no commit"
    return f"{where}; {versions}; commit {commit['hash'][:10]}{' with changes' if commit['dirty'] else ''}"
