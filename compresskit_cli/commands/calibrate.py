"""`compresskit calibrate`: what a model's layers see on some texts, saved for `compress` and `plan`."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compresskit_cli.calibration_options import MAX_LENGTH, SAMPLES
from compresskit_cli.command import Command
from compresskit_cli.options import model_options

if TYPE_CHECKING:
    from compresskit.calibration import Calibration


@click.command(name="calibrate", cls=Command)
@model_options
@click.option("--data", required=True, metavar="FILE_OR_FOLDER", help="Texts (*.txt), a folder at any depth.")
@click.option("--samples", type=click.IntRange(1), default=SAMPLES, show_default=True, help="Texts in all.")
@click.option("--max-length", type=click.IntRange(2), default=MAX_LENGTH, show_default=True, help="Tokens of a text.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Texts that run together.")
@click.option("--gradients", is_flag=True, help="Also moments of gradients at the outputs (K-FAC).")
@click.option("--max-width", type=click.IntRange(1), default=4096, show_default=True, help="Wider: diagonals only.")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write (*.safetensors).")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(
    model: str,
    dtype: str,
    device: str,
    revision: str | None,
    seed: int,
    data: str,
    samples: int,
    max_length: int,
    batch_size: int,
    gradients: bool,
    max_width: int,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Collect what the layers of MODEL see, for data-aware fits.

    MODEL is a folder or hub id. Examples:

    \b
        compresskit calibrate ./model --data texts -o moments.safetensors
        compresskit compress ./model -m svd --ratio 4 --calibration moments.safetensors
    """
    from compresskit_cli import render
    from compresskit_cli.calibration_options import collect
    from compresskit_cli.loading import load

    _check(output, force=force)
    loaded, folder = load(model, revision=revision, dtype=dtype, device=device, seed=seed)
    started = time.perf_counter()
    with render.progress_bar() as on_progress:
        made = collect(
            loaded,
            folder,
            data,
            samples=samples,
            max_length=max_length,
            gradients=gradients,
            seed=seed,
            on_progress=on_progress,
            batch_size=batch_size,
            max_width=max_width,
        )
    time_s = time.perf_counter() - started
    made.save(output)
    if as_json:
        facts = {**made.to_json(), "warnings": made.warnings()}
        click.echo(json.dumps({"output": str(output), "time_s": time_s, **facts}, indent=1))
    else:
        _print(made, time_s, output)


def _check(path: Path, *, force: bool) -> None:
    """Raise OutputError if the file could not be written there; before the work, not after it."""
    from compresskit.errors import OutputError

    if path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give the name of a file")
    if path.exists() and not force:
        raise OutputError(f"{str(path)!r} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")


def _print(made: "Calibration", time_s: float, output: Path) -> None:
    from compresskit_cli.render import count, facts, say, size

    rows = [
        ("texts", count(made.samples)),
        ("tokens without padding", count(made.tokens)),
        ("layers", count(len(made.uses))),
        ("memory of the moments", size(made.memory_bytes)),
        ("gradients of", made.loss or "none"),
        ("time", f"{time_s:.1f} s"),
        ("saved to", str(output)),
    ]
    facts("Calibration", rows)
    for warning in made.warnings():
        say(f"Warning: {warning}")
