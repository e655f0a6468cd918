"""`python -m benchmarks`: run the experiments of a suite, report what they measured, list what there is."""

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path
from typing import Any

import click

from benchmarks.experiments import SuiteError
from benchmarks.experiments.quality import STS_B
from benchmarks.report import report_suite
from benchmarks.runner import RESULTS, WORK, run_suite, state
from benchmarks.suites import SUITES, read_suite, suite_names

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)


def _folders(command: Callable[..., None]) -> Callable[..., None]:
    """Options that all commands have, and a suite that does not exist as a usage error (status 2)."""

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except SuiteError as error:
            raise click.UsageError(str(error)) from error

    suites = click.option("--suites", type=EXISTING, default=SUITES, help="Folder of the suites.")
    results = click.option("--results", type=FOLDER, default=RESULTS, help="Folder of the results.")
    return suites(results(checked))


@click.group()
def main() -> None:
    """Benchmarks of compresskit."""


@main.command()
@click.argument("suite")
@click.option("--force", is_flag=True, help="Measure anew what has a result.")
@click.option("--only", metavar="GLOB", default="*", help="Only experiments with such a name, as `list` shows them.")
@click.option("--data", type=EXISTING, help="Folder with evaluation data (glue/STS-B/dev.tsv) and plain text (text).")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="So many at a time, each forked from a process that has its libraries; for a GPU. Above 1 not for timing.",
)
@click.option("--work", type=FOLDER, default=WORK, help="Folder where long experiments keep what they can go on from.")
@_folders
def run(
    suite: str, force: bool, only: str, data: Path | None, jobs: int | None, work: Path, suites: Path, results: Path
) -> None:
    """Measure what has no result of the same configuration yet."""
    every = read_suite(suite, suites)
    entries = [entry for entry in every if fnmatchcase(entry.name, only)]
    if not entries:
        near = difflib.get_close_matches(only, [entry.name for entry in every], n=5, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise click.UsageError(
            f"--only {only!r} matches none of the {len(every)} experiments of {suite}{hint}. "
            "`python -m benchmarks list` prints all"
        )
    if data is not None and not (data / STS_B).exists():
        raise click.UsageError(f"the folder of --data has no {STS_B.as_posix()}")
    try:
        tally = run_suite(entries, results, data=data, work=work, force=force, jobs=jobs, echo=click.echo)
    except KeyboardInterrupt:
        click.echo("interrupted; results that were complete are kept", err=True)
        raise click.exceptions.Exit(130) from None
    click.echo(", ".join(f"{len(names)} {what}" for what, names in vars(tally).items()))
    if tally.failed:
        raise click.ClickException(f"failed: {', '.join(tally.failed)}")


@main.command()
@click.argument("suite", required=False)
@_folders
def report(suite: str | None, suites: Path, results: Path) -> None:
    """Print Markdown tables of the results of one suite, or of all but the smoke test."""
    names = [suite] if suite else [name for name in suite_names(suites) if name != "smoke"]
    click.echo("\n\n".join(report_suite(read_suite(name, suites), results) for name in names))


@main.command(name="list")
@_folders
def list_(suites: Path, results: Path) -> None:
    """Print every experiment and whether it has a result: current, changed (its configuration) or missing."""
    for name in suite_names(suites):
        for entry in read_suite(name, suites):
            click.echo(f"{entry.suite}/{entry.name}: {state(entry, results)}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
