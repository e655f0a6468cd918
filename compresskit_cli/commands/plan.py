"""`compresskit plan`: what `compress` would do, to look at, edit and replay."""

import json
from pathlib import Path
from typing import Any

import click

from compresskit_cli.command import Command
from compresskit_cli.options import Choice, choice_options, model_options


@click.command(name="plan", cls=Command)
@model_options
@choice_options
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
    **choice: Any,
) -> None:
    """Plan the compression of MODEL (a folder or hub id) without changing or saving anything.

    The JSON can be edited and replayed with `compresskit compress MODEL --plan FILE`.
    """
    from compresskit import plan
    from compresskit.errors import OutputError
    from compresskit_cli import render
    from compresskit_cli.loading import load

    arguments = Choice(**choice).arguments()
    if output is not None and output.exists() and not force:
        raise OutputError(f"{str(output)!r} exists; --force replaces it")
    loaded, _ = load(model, revision=revision, dtype=dtype, device=device, seed=seed)
    with render.progress_bar() as on_progress:
        made = plan(loaded, **arguments, on_progress=on_progress)
    text = json.dumps(made.to_json(), indent=1)
    if output is not None:
        _write(output, text)
    if as_json:
        click.echo(text)
    else:
        render.plan(made)
        if output is not None:
            render.console.print(f"written to {output}; replay with: compresskit compress {model} --plan {output}")


def _write(path: Path, text: str) -> None:
    from compresskit.errors import OutputError

    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text + "\n", "utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"the plan cannot be written to {str(path)!r}: {error.strerror or error}") from error
