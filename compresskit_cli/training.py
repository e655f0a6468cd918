"""What commands that train or evaluate share: opening models for a task, and bars."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from compresskit_cli.loading import quiet_transformers
from compresskit_cli.render import progress_console

if TYPE_CHECKING:
    from compresskit.recipes import OnStage
    from compresskit.tasks import OnTrainProgress, TrainProgress


def begin_training() -> None:
    """Before a model is opened to be trained: no progress bars but ours, and freed memory is kept for the next step."""
    from compresskit import keep_freed_memory

    keep_freed_memory()
    quiet()


def quiet() -> None:
    """No progress bars but ours."""
    import datasets

    quiet_transformers()
    datasets.disable_progress_bars()


@contextmanager
def training_bar() -> Iterator["OnTrainProgress"]:
    """A bar on the standard error: steps, time left, loss, throughput, last score."""
    with stage_bars() as show:
        yield partial(show, "training")


@contextmanager
def stage_bars() -> Iterator["OnStage"]:
    """A bar as `training_bar` for each stage, by its name; a line a minute if the standard error is no terminal."""
    from compresskit.tasks import is_first

    if not (progress_console.is_terminal and is_first()):
        yield ProgressLines()
        return
    with _bar("{task.fields[said]}") as bar:
        rows: dict[str, Any] = {}

        def show(stage: str, progress: "TrainProgress") -> None:
            if stage not in rows:
                rows[stage] = bar.add_task(stage, total=None, said="")
            bar.update(rows[stage], completed=progress.step, total=progress.total, said=training_line(progress))

        yield show


@final
class ProgressLines:
    """Prints how a training goes, for logs of batch systems: a line every `every_s` seconds."""

    def __init__(self, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._printed = clock()
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, progress: "TrainProgress") -> None:
        now = self._clock()
        start, first = self._began.setdefault(stage, (now, progress.step))
        if now - self._printed < self._every_s:
            return
        self._printed = now
        left_s = (now - start) / max(progress.step - first, 1) * (progress.total - progress.step)
        steps = f"{stage} {progress.step:,}/{progress.total:,}, {left_s / 60:,.0f} min left"
        progress_console.print(f"{steps}  {training_line(progress)}", soft_wrap=True)


def training_line(progress: "TrainProgress") -> str:
    """`epoch 1.20  loss 0.512 (logits 0.312, task 0.200)  310 examples/s  f1 0.812`."""
    terms = ", ".join(f"{name} {value:.3g}" for name, value in progress.terms.items())
    loss = "" if progress.loss is None else f"loss {progress.loss:.4f}{f' ({terms})' if terms else ''}  "
    scores = "".join(f"  {name} {value:.4f}" for name, value in list(progress.metrics.items())[:2])
    return f"epoch {progress.epoch:.2f}  {loss}{progress.examples_per_s:,.0f} examples/s{scores}"


@contextmanager
def evaluation_bar(name: str) -> Iterator[Any]:
    """A bar for `on_batch` of an evaluation."""
    with _bar("") as bar:
        row = bar.add_task(name, total=None, said="")
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _bar(last: str) -> Any:
    from rich import progress as bars
    from rich.table import Column

    return bars.Progress(
        bars.TextColumn("{task.description:<10}", markup=False),
        bars.BarColumn(bar_width=30),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn(last, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=progress_console,
        disable=not progress_console.is_terminal,
    )


def spare_model(model: str, output: Path) -> None:
    """Raise OutputError if `--force` would replace the model itself, or a folder that it is in."""
    from compresskit.errors import OutputError

    folder = Path(model).expanduser()
    if folder.is_dir():
        source, target = folder.resolve(), output.expanduser().resolve()
        if target in (source, *source.parents):
            raise OutputError(f"{output} holds the model that is to be trained; choose another folder")


def run_folder(output: Path, *, resume: bool, force: bool) -> Path:
    """Where checkpoints go until the output is complete.

    Raises:
        TrainingError: an interrupted run is there, and is neither to be resumed nor to be discarded.
    """
    from compresskit.errors import TrainingError
    from compresskit.tasks import close_run, interrupted_run, is_first

    path = output.expanduser().absolute()
    run = path.with_name(f"{path.name}.run")
    if is_first() and interrupted_run(run) and not resume:
        if not force:
            raise TrainingError(f"{run} holds an interrupted run: --resume goes on with it, --force discards it")
        close_run(run)
    return run
