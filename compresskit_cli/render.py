"""Tables for people. Everything here takes plain data or public objects of compresskit."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from compresskit import Plan, Report
    from compresskit.surgery.pricing import OnProgress, Progress

WIDTH = None if sys.stdout.isatty() else 140
"""A file or pipe has no width of its own; 80 columns would break layer names."""

console = Console(width=WIDTH)
progress_console = Console(stderr=True)

STAGES = {"analyse": "analysing", "fit": "fitting"}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; every column but the first is right-aligned."""
    grid = Table(title=title, title_justify="left", header_style="bold", title_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console.print(grid)


def count(n: int) -> str:
    """1234567 -> `1,234,567`."""
    return f"{n:,}"


def size(num_bytes: int) -> str:
    """Bytes as `12.3 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes = num_bytes / 1000  # type: ignore[assignment]
    raise AssertionError


@contextmanager
def progress_bar() -> Iterator["OnProgress"]:
    """A progress bar on the standard error: layer, error, time left. Silent when that is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}"),
    )
    with Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(step: "Progress") -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bar.add_task(STAGES[step.stage], total=step.total, layer="")
            error = "" if step.error is None else f"  error {step.error:.3f}"
            bar.update(tasks[step.stage], completed=step.done, layer=step.name + error)

        yield show  # type: ignore[misc]


def plan(plan: "Plan") -> None:
    """One row per site, then the sums and what stays dense."""
    rows = [
        (
            p.site.name,
            f"{p.site.rows} x {p.site.cols}",
            p.structure,
            count(p.params),
            f"{p.site.num_params / p.params:.1f}",
            count(p.macs),
            "" if p.expected_error is None else f"{p.expected_error:.3f}",
        )
        for p in plan.sites
    ]
    table("Plan", ("layer", "weight", "structure", "params", "ratio", "MACs/token", "expected error"), rows)
    left_dense(plan.left)
    gap = "" if plan.gap is None else f"; at most {plan.gap:.2%} from the least possible loss"
    console.print(
        f"whole model {count(plan.num_params)} -> {count(plan.params_after)} parameters, ratio {plan.ratio:.3f}; "
        f"multiply-adds in these layers {count(plan.dense_macs)} -> {count(plan.macs)} per token{gap}",
        highlight=False,
    )


def report(report: "Report") -> None:
    """Errors per group of layers, what stayed dense, and the ratios."""
    rows = []
    for group, sites in report.by_group().items():
        before, after = sum(s.params_before for s in sites), sum(s.params_after for s in sites)
        errors = [s.relative_error for s in sites]
        kinds = sorted({s.structure for s in sites})
        structures = kinds[0] if len(kinds) == 1 else f"{len(kinds)} structures, e.g. {kinds[0]}"
        spread = f"{sum(errors) / len(errors):.3f}" + (
            f" ({min(errors):.3f}-{max(errors):.3f})" if len(sites) > 1 else ""
        )
        rows.append((group, len(sites), structures, count(after), f"{before / after:.1f}", spread))
    table("Replaced layers", ("layers", "number", "structure", "params", "ratio", "relative error"), rows)
    left_dense(report.left)
    slower = [s.name for s in report.sites if s.macs_after > s.macs_before > 0]
    if slower:
        console.print(f"[yellow]Warning:[/] slower than dense, as you allowed: {', '.join(slower)}")


def left_dense(left: Sequence[Any], most: int = 8) -> None:
    """What stayed dense, the largest first."""
    if left:
        largest = sorted(left, key=lambda refusal: -refusal.num_params)
        rows = [(r.name, count(r.num_params), r.reason) for r in largest[:most]]
        more = f" (the {most} largest of {len(left)})" if len(left) > most else ""
        table(f"Left dense{more}", ("layer", "params", "why"), rows)
