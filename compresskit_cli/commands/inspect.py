"""`compresskit inspect`: what is in a compressed checkpoint, read from its headers alone."""

import json

import click

from compresskit_cli.command import Command


@click.command(name="inspect", cls=Command)
@click.argument("checkpoint")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: str, revision: str | None, as_json: bool) -> None:
    """Show the layers, structures, ratios and provenance of CHECKPOINT (a folder or hub id). Loads no weights."""
    from compresskit.hub import inspect_checkpoint, resolve
    from compresskit_cli import render

    found = inspect_checkpoint(resolve(checkpoint, revision))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    rows = [
        (
            site.name,
            f"{site.structure.rows} x {site.structure.cols}",
            site.structure,
            f"shared with {site.shared_with}" if site.shared_with else render.count(site.structure.num_params),
            f"{site.structure.rows * site.structure.cols / site.structure.num_params:.1f}",
        )
        for site in found.sites
    ]
    render.table("Factorised layers", ("layer", "weight", "structure", "params", "ratio"), rows)
    facts = [
        ("architecture", found.architecture),
        ("format version", found.format_version),
        ("parameters", f"{render.count(found.dense_params)} -> {render.count(found.params)}"),
        ("ratio, whole model", f"{found.ratio:.3f}"),
        ("bytes of weights", render.size(found.weight_bytes)),
        *((f"made with: {key}", value) for key, value in found.provenance.items()),
    ]
    render.table("Checkpoint", ("", ""), facts)
