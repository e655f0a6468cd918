"""Tables for people. Everything here takes plain data or public objects of compresskit."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from compresskit import FrontPoint, OnProgress, Plan, Progress, Report, Target

WIDTH = None if sys.stdout.isatty() else 1000
"""A file or pipe has no width: nothing is folded there, so that each layer stays on one line."""

console = Console(width=WIDTH, markup=False, emoji=False, highlight=False)
progress_console = Console(stderr=True, markup=False, emoji=False, highlight=False)

GAP = 2
"""Columns of a terminal between two columns of a table."""

MIN_FOLDED = 18
"""Text is not folded to less than this."""

LITTLE = 0.9
"""Above this relative error less than a fifth of the energy, of a weight or of a layer's outputs, is left."""

STAGES = {
    "calibrate": "calibrating",
    "analyse": "analysing",
    "compare": "comparing",
    "fit": "fitting",
    "refine": "refining",
    "measure": "measuring",
    "search": "searching",
    "rivals": "trying",
}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are right-aligned. What does not fit is folded, names in front last."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    texts = [i for i in range(len(columns)) if not all(row[i][:1].isdigit() for row in cells if row[i])]
    excess = sum(widths) + GAP * len(widths) - console.width
    longest = max(texts[1:], key=widths.__getitem__, default=None)  # after the names, which nobody should have to join
    grid = _grid(title)
    for i, column in enumerate(columns):
        grid.add_column(
            column,
            justify="left" if i in texts else "right",
            overflow="fold",
            max_width=max(MIN_FOLDED, widths[i] - excess) if i == longest and excess > 0 else None,
        )
    for row in cells:
        grid.add_row(*row)
    console.print(grid, "")


def facts(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print labels with their values."""
    grid = _grid(title, show_header=False)
    for label, value in rows:
        grid.add_row(label, str(value))
    console.print(grid, "")


def _grid(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        show_header=show_header,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )


def say(text: str) -> None:
    """Print a line."""
    console.print(text, soft_wrap=True)


def foldable(structure: object) -> str:
    """`kronecker(left=2x2, ...)` with a place before the sizes where a narrow table may break the line."""
    return str(structure).replace("(", " (", 1)


def count(n: int) -> str:
    """1234567 -> `1,234,567`."""
    return f"{n:,}"


def size(num_bytes: float) -> str:
    """Bytes as `12.3 MB` (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


@contextmanager
def progress_bar() -> Iterator["OnProgress"]:
    """A progress bar on the standard error: layer, error, time left. Silent when that is not a terminal."""
    from rich import progress as bars
    from rich.table import Column

    columns = (
        bars.TextColumn("{task.description:<11}", markup=False),
        bars.BarColumn(bar_width=30),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[layer]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with bars.Progress(*columns, console=progress_console, disable=not progress_console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(step: "Progress") -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bar.add_task(STAGES[step.stage], total=step.total, layer="")
            error = "" if step.error is None else f"error {step.error:.3f}  "
            bar.update(tasks[step.stage], completed=step.done, total=step.total, layer=error + step.name)

        yield show


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Something that turns on the standard error while one waits. Silent when that is not a terminal."""
    if not progress_console.is_terminal:
        yield
        return
    with progress_console.status(text):
        yield


def plan(plan: "Plan", *, calibrated: bool = False) -> None:
    """One row per site, then the sums and what stays dense."""
    chosen = any(p.alternatives for p in plan.sites)
    rows = [
        (
            p.site.name,
            f"{p.site.rows} x {p.site.cols}",
            foldable(p.structure),
            count(p.params),
            f"{p.site.num_params / p.params:.1f}",
            count(p.macs),
            f"{p.speedup:.1f}" if p.site.multiplied else "",
            "" if p.expected_error is None else f"{p.expected_error:.3f}",
            *((_others(p.alternatives, p.decomposition.name),) if chosen else ()),
        )
        for p in plan.sites
    ]
    columns = ("layer", "weight", "structure", "params", "ratio", "MACs", "speed-up", "error")
    table("Plan", (*columns, *(("best of the others",) if chosen else ())), rows)
    _speed_by_group(plan)
    front(plan.front)
    left_dense(plan.left)
    gap = "" if plan.gap is None else f"; at most {plan.gap:.2%} from the least possible loss"
    if plan.searched:
        say(f"By the search errors count {searched(plan.searched)}.")
    if plan.compared:
        say(f"Whole models compared, each wrong by: {compared(plan.compared)}.")
    say(f"Whole model: {count(plan.num_params)} -> {count(plan.params_after)} parameters, ratio {plan.ratio:.3f}{gap}.")
    say(f"Replaceable layers hold {plan.coverage:.1%} of the parameters.")
    say(f"Multiply-adds (MACs) per token in these layers: {count(plan.dense_macs)} -> {count(plan.macs)}.")
    say(f"Expected speed-up of these layers together: {plan.speedup:.2f} ({plan.target}; not measured).")
    warn_slower([p.site.name for p in plan.sites if p.slower], plan.speedup)
    of_what = "of the layer's output on the samples" if calibrated else "of the weight (Frobenius)"
    say(f"Errors are relative to the norm {of_what} and expected, not yet measured.")


def report(report: "Report") -> None:
    """Errors per group of layers, what stayed dense, and the ratios."""
    rows = []
    for group, sites in report.by_group().items():
        before, after = sum(s.params_before for s in sites), sum(s.params_after for s in sites)
        errors = [s.relative_error for s in sites]
        weighted = [s.weighted_error for s in sites if s.weighted_error is not None]
        kinds = sorted({s.structure for s in sites})
        methods = " and ".join(sorted({s.method for s in sites}))
        structures = foldable(kinds[0]) if len(kinds) == 1 else f"{methods}, {len(kinds)} sizes"
        mean, worst = sum(errors) / len(errors), max(errors)
        output = (f"{sum(weighted) / len(weighted):.3f}" if weighted else "",) if report.calibration else ()
        sizes = (count(after), f"{before / after:.1f}")
        rows.append((group, len(sites), structures, *sizes, f"{mean:.3f}", f"{worst:.3f}", *output))
    columns = ("layers", "number", "structure", "params", "ratio", "error", "worst")
    table("Replaced layers", (*columns, *(("output error",) if report.calibration else ())), rows)
    front(report.front)
    left_dense(report.left)
    for warning in (report.calibration or {}).get("warnings", ()):
        say(f"Warning: {warning}")
    _warn_little(report)
    warn_slower([s.name for s in report.sites if s.slower], report.expected_speedup)


def _warn_little(report: "Report") -> None:
    """Say of which layers next to nothing is left, of their outputs where these were fitted, else of their weights: no
    model is of use with such layers until it is trained."""
    fitted = report.weighted_error is not None
    errors = {s.name: s.relative_error if s.weighted_error is None else s.weighted_error for s in report.sites}
    lost = sorted((name for name, error in errors.items() if error > LITTLE), key=lambda name: -errors[name])
    if lost:
        named = ", ".join(f"{name} {errors[name]:.3f}" for name in lost[:2])
        say(
            f"Warning: {len(lost)} of {len(report.sites)} layers keep less than a fifth of the energy of their "
            f"{'outputs' if fitted else 'weights'} (errors: {named}{', ...' if len(lost) > 2 else ''}). Expect little "
            "of the model before it is trained (compresskit distill); --method auto, or --rule 'PATTERN=svd' for these "
            "layers, may keep more."
        )


def _others(alternatives: Sequence[tuple[str, float]], chosen: str, most: int = 2) -> str:
    """What other methods would have reached with as many parameters."""
    return ", ".join([f"{name} {error:.3f}" for name, error in alternatives if name != chosen][:most])


def searched(factors: Sequence[tuple[str, float]]) -> str:
    """How much more or less errors of layers of some shapes were found to count."""
    return ", ".join(f"{factor:g} times for {shape}" for shape, factor in factors)


def compared(errors: Sequence[tuple[str, float]]) -> str:
    """What each plan's model was off by, the one that was taken first."""
    (taken, least), *others = errors
    return ", ".join([f"{taken} {least:.4f} (taken)", *(f"{name} {error:.4f}" for name, error in others)])


def front(points: "Sequence[FrontPoint]") -> None:
    """Other sizes of the same model, and what they would lose."""
    if points:
        rows = [
            (
                count(p.params),
                f"{p.ratio:.2f}",
                count(p.macs),
                f"{p.time_ns / 1e6:.2f}",
                f"{p.error:.4f}",
                f"{p.gap:.2%}",
            )
            for p in points
        ]
        table("Front", ("params", "ratio", "MACs", "expected ms", "error", "gap"), rows)


def _speed_by_group(plan: "Plan") -> None:
    """Expected times of a forward pass before and after, by group of layers."""
    rows = []
    for group, sites in plan.by_group().items():
        dense, ours = sum(p.dense_time_ns for p in sites), sum(p.time_ns for p in sites)
        rows.append((group, len(sites), f"{dense / 1e6:.3f}", f"{ours / 1e6:.3f}", f"{dense / ours:.2f}"))
    table("Expected time", ("layers", "number", "dense ms", "planned ms", "speed-up"), rows)


def warn_slower(names: Sequence[str], speedup: float) -> None:
    """Say which layers are expected to be notably slower than dense, which only what was asked for can be, or if all
    together are."""
    if speedup < 1:
        say(f"Warning: together these layers are expected to run slower than dense ones ({speedup:.2f} times as fast).")
    if names:
        say(f"Warning: expected to be slower than dense, as you asked for them or allowed it: {', '.join(names)}")


def note_type(dtype: str, target: "Target") -> None:
    """Say if times are expected for another type than the model's, such as `torch.bfloat16`."""
    own = dtype.removeprefix("torch.")
    if own != target.machine.dtype:
        say(
            f"Note: times are expected for {target.machine.dtype}, this model computes in {own}: factorised layers may "
            "run slower than dense there. --machine plans for another machine; compresskit machines lists them."
        )


def left_dense(left: Sequence[Any], most: int = 8) -> None:
    """What stayed dense, the largest first."""
    if left:
        largest = sorted(left, key=lambda refusal: -refusal.num_params)
        rows = [(r.name, count(r.num_params), r.reason) for r in largest[:most]]
        more = f" (the {most} largest of {len(left)})" if len(left) > most else ""
        table(f"Left dense{more}", ("layer", "params", "why"), rows)
