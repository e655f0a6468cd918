"""`compresskit plan`: what `compress` would do, to look at, edit and replay."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit_cli.calibration_options import Samples, calibration_options
from compresskit_cli.command import Command
from compresskit_cli.judge_options import TaskJudge, judge_options
from compresskit_cli.options import Choice, choice_options, model_options

if TYPE_CHECKING:
    from compresskit import Plan


@click.command(name="plan", cls=Command)
@model_options
@choice_options
@calibration_options
@judge_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also write the plan to this JSON file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw the front, other sizes' errors, as this SVG.")
@click.option("--force", is_flag=True, help="Replace an existing --output or --plot file.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    model: str,
    dtype: str,
    device: str,
    revision: str | None,
    seed: int,
    output: Path | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    calibrate: str | None,
    samples: int | None,
    max_length: int | None,
    gradients: bool,
    sensitivity: str,
    compare: bool,
    judge: str | None,
    judge_data: str | None,
    judge_split: str | None,
    robust: bool,
    even_words: bool,
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
    texts = Samples(
        calibrate,
        samples,
        max_length,
        gradients,
        calibration,
        sensitivity=sensitivity,
        robust=robust,
        even_words=even_words,
        compare=compare,
    )
    by_task = TaskJudge(judge, judge_data, judge_split)
    texts.check(judged=judge is not None)
    by_task.check(texts)
    texts.check_methods(arguments)
    for path, kind in ((output, "JSON"), (plot, "SVG")):
        if path is not None:
            check_file(path, force=force, kind=kind)
    loaded, folder = load(model, revision=revision, dtype=dtype, device=device, seed=seed)
    with render.progress_bar() as on_progress:
        by = by_task.made(loaded, folder)
        how = texts.collect(loaded, folder, seed=seed, judge=by, on_progress=on_progress)
        made = plan(loaded, **arguments, **how, on_progress=on_progress)
    text = json.dumps(made.to_json(), indent=1)
    if output is not None:
        write_file(output, text + "\n")
    if plot is not None:
        write_file(plot, _drawn(made))
    if as_json:
        click.echo(text)
    else:
        render.plan(made, calibrated="calibration" in how)
        render.note_type(str(loaded.dtype), made.target)
        if output is not None:
            render.say(f"Written to {output}; replay it with: {shlex.join(_replay(model, revision, output))}")


def _drawn(made: "Plan") -> str:
    from compresskit.errors import OutputError
    from compresskit_cli.plot import front_svg

    if not made.front:
        raise OutputError("the options leave one structure per layer, so there is no front to draw; give a size")
    return front_svg(made)


def _replay(model: str, revision: str | None, output: Path) -> list[str]:
    pinned = [] if revision is None else ["--revision", revision]
    return ["compresskit", "compress", model, *pinned, "--plan", str(output)]
