"""`compresskit plan`: what `compress` would do, to look at, edit and replay."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from compresskit_cli.calibration_options import Samples, calibration_options
from compresskit_cli.command import Command
from compresskit_cli.options import Choice, choice_options, model_options


@click.command(name="plan", cls=Command)
@model_options
@choice_options
@calibration_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also write the plan to this JSON file.")
@click.option("--force", is_flag=True, help="Replace an existing --output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    model: str,
    dtype: str,
    device: str,
    revision: str | None,
    seed: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    calibrate: str | None,
    samples: int | None,
    max_length: int | None,
    gradients: bool,
    calibration: Path | None,
    **choice: Any,
) -> None:
    """Show what compress would do, as data to edit and replay.

    MODEL is a folder or hub id; no model is saved. The JSON that --output or --json writes can be edited and replayed
    with `compresskit compress MODEL --plan FILE`.
    """
    from compresskit import plan
    from compresskit_cli import render
    from compresskit_cli.files import check_file, write_file
    from compresskit_cli.loading import load

    arguments = Choice(**choice).arguments()
    texts = Samples(calibrate, samples, max_length, gradients, calibration)
    texts.check()
    if output is not None:
        check_file(output, force=force, kind="JSON")
    loaded, folder = load(model, revision=revision, dtype=dtype, device=device, seed=seed)
    with render.progress_bar() as on_progress:
        moments = texts.collect(loaded, folder, seed=seed, on_progress=on_progress).get("calibration")
        made = plan(loaded, **arguments, calibration=moments, on_progress=on_progress)
    text = json.dumps(made.to_json(), indent=1)
    if output is not None:
        write_file(output, text + "\n")
    if as_json:
        click.echo(text)
    else:
        render.plan(made, calibrated=moments is not None)
        if output is not None:
            render.say(f"Written to {output}; replay it with: {shlex.join(_replay(model, revision, output))}")


def _replay(model: str, revision: str | None, output: Path) -> list[str]:
    pinned = [] if revision is None else ["--revision", revision]
    return ["compresskit", "compress", model, *pinned, "--plan", str(output)]
