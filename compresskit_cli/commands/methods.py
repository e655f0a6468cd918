"""`compresskit methods`: the decompositions, their options and sources."""

import dataclasses
import json

import click

from compresskit_cli.command import Command


@click.command(name="methods", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the decompositions with their options and sources."""
    from compresskit import decompositions
    from compresskit.core.options import describe, option_text, option_types
    from compresskit_cli import render

    known = [
        {
            "name": name,
            "summary": cls.summary,
            "source": cls.source,
            "options": {
                field.name: {
                    "type": describe(option_types(cls)[field.name]),
                    "default": option_text(field.default),
                }
                for field in dataclasses.fields(cls)
            },
        }
        for name, cls in decompositions().items()
    ]
    if as_json:
        click.echo(json.dumps(known, indent=2))
        return
    for method in known:
        render.console.print(f"[bold]{method['name']}[/]  {method['summary']}", highlight=False)
        render.console.print(f"    source: {method['source']}", highlight=False)
        options = method["options"]
        assert isinstance(options, dict)
        for key, option in options.items():
            render.console.print(f"    --set {key}={option['default']}  {option['type']}", highlight=False)
