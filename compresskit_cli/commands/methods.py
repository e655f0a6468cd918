"""`compresskit methods`: the decompositions, their options and sources."""

import json

import click

from compresskit_cli.command import Command


@click.command(name="methods", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the decompositions, their options and sources."""
    from compresskit import describe_options, methods
    from compresskit_cli import render

    known = [
        {
            "name": name,
            "summary": cls.summary,
            "source": cls.source,
            "options": {
                option: {"type": kind, "default": default} for option, (kind, default) in describe_options(cls).items()
            },
        }
        for name, cls in methods().items()
    ]
    if as_json:
        click.echo(json.dumps(known, indent=2))
        return
    for method in known:
        render.console.print(method["name"], style="bold")
        render.say(f"    {method['summary']}")
        render.say(f"    source: {method['source']}")
        options = method["options"]
        assert isinstance(options, dict)
        for key, option in options.items():
            render.say(f"    --set {key}={option['default']}  ({option['type']})")
