"""`compresskit presets`: the recipes that `distill` follows, to list, to read and to edit."""

import json
from pathlib import Path

import click

from compresskit_cli.command import Command


@click.command(name="presets", cls=Command)
@click.argument("preset", required=False)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the preset to this file.")
@click.option("--force", is_flag=True, help="Replace an existing --output file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(preset: str | None, output: Path | None, force: bool, as_json: bool) -> None:
    """List the presets of distill, or print one.

    PRESET is a name or NAME:VARIANT. What is printed is a TOML file with sources; edited, it is passed back:

    \b
        compresskit presets kroneckerbert:k21 --output my.toml
        compresskit distill --preset my.toml ...
    """
    from compresskit.recipes import preset as find
    from compresskit.recipes import preset_text, presets
    from compresskit_cli import render
    from compresskit_cli.files import check_file, write_file

    if preset is None:
        if output is not None:
            raise click.UsageError("--output belongs to one preset: name it")
        found = presets()
        if as_json:
            rows = [{"name": name, "summary": made.summary, "source": made.source} for name, made in found.items()]
            click.echo(json.dumps(rows, indent=1))
        else:
            render.table("Presets", ("preset", "what it does"), [(name, made.summary) for name, made in found.items()])
            render.say("compresskit presets PRESET prints one with its sources, to edit and pass back.")
        return
    text = preset_text(preset)
    if output is not None:
        check_file(output, force=force, kind="TOML")
        write_file(output, text)
    if as_json:
        click.echo(json.dumps(find(preset).data, indent=1))
    elif output is None:
        click.echo(text, nl=False)
    else:
        render.say(f"Written to {output}; use it with: compresskit distill --preset {output} ...")
