"""What commands that train or evaluate share: opening models for a task, and bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit_cli.loading import quiet_transformers
from compresskit_cli.render import progress_console

if TYPE_CHECKING:
    from compresskit.tasks import OnTrainProgress, TrainProgress


def quiet() -> None:
    """No progress bars but ours."""
    import datasets

    quiet_transformers()
    datasets.disable_progress_bars()


@contextmanager
def training_bar() -> Iterator["OnTrainProgress"]:
    """A bar on the standard error: steps, time left, loss, throughput, last score. Silent if that is no terminal."""
    with _bar("{task.fields[said]}") as bar:
        row = bar.add_task("training", total=None, said="")

        def show(progress: "TrainProgress") -> None:
            bar.update(row, completed=progress.step, total=progress.total, said=training_line(progress))

        yield show


def training_line(progress: "TrainProgress") -> str:
    """`epoch 1.20  loss 0.512  310 examples/s  f1 0.812`."""
    loss = "" if progress.loss is None else f"loss {progress.loss:.4f}  "
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
