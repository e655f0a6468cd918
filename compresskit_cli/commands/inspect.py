"""`compresskit inspect`: what is in a compressed checkpoint, read from its headers alone."""

import json
from typing import Any

import click

from compresskit_cli.command import Command


@click.command(name="inspect", cls=Command)
@click.argument("checkpoint")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: str, revision: str | None, as_json: bool) -> None:
    """Show what is in a compressed checkpoint.

    Layers, structures, ratios and provenance of CHECKPOINT, a folder or hub id, from its headers alone.
    """
    from compresskit.hub import inspect_checkpoint, resolve
    from compresskit_cli import render

    found = inspect_checkpoint(resolve(checkpoint, revision))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    render.table(
        "Factorised layers", ("layer", "weight", "structure", "params", "ratio"), [_row(s) for s in found.sites]
    )
    render.facts(
        "Checkpoint",
        [
            ("architecture", found.architecture),
            ("format version", found.format_version),
            ("parameters", f"{render.count(found.dense_params)} -> {render.count(found.params)}"),
            ("ratio, whole model", f"{found.ratio:.3f}"),
            ("bytes of weights", render.size(found.weight_bytes)),
            *((f"made with: {key}", _text(value)) for key, value in found.provenance.items() if value is not None),
        ],
    )


def _row(site: Any) -> tuple[str, ...]:
    from compresskit_cli.render import count, foldable

    structure = site.structure
    size = f"{structure.rows} x {structure.cols}"
    if site.shared_with is not None:
        return site.name, size, f"shared with {site.shared_with}", "", ""
    ratio = structure.rows * structure.cols / structure.num_params
    return site.name, size, foldable(structure), count(structure.num_params), f"{ratio:.1f}"


def _text(value: Any) -> str:
    """Provenance is whatever the maker of the checkpoint wrote."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return " ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)
