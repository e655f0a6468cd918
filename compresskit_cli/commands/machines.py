"""`compresskit machines`: where a model can be planned to be fast; to list, read, measure and edit."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compresskit_cli.command import Command

if TYPE_CHECKING:
    from compresskit.machines import Measured


@click.command(name="machines", cls=Command)
@click.argument("machine", required=False)
@click.option(
    "--measure", is_flag=True, help="Time operations and layers here, for one to two minutes; leave it alone."
)
@click.option(
    "--dtype", type=click.Choice(("float32", "bfloat16", "float16")), help="With --measure. [default: float32]"
)
@click.option("--device", help="With --measure: cpu or cuda. [default: cpu]")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the machine to this TOML file.")
@click.option("--force", is_flag=True, help="Replace an existing --output file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    machine: str | None,
    measure: bool,
    dtype: str | None,
    device: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """List machines that plans are made for, or measure this one.

    MACHINE is a name or a file. A plan takes no structure that is expected to run slower there than the dense layer.

    \b
        compresskit machines --measure --dtype bfloat16 --output mine.toml
        compresskit compress ./model -m kronecker --ratio 8 --machine mine.toml
    """
    if (machine is not None) and measure:
        raise click.UsageError("--measure measures this machine; it takes no name of another")
    if not measure and (dtype or device):
        raise click.UsageError("--dtype and --device belong to --measure")
    if output is not None and machine is None and not measure:
        raise click.UsageError("--output belongs to one machine: name it, or --measure this one")
    from compresskit.machines import machine as find
    from compresskit.machines import machine_text, machine_to_data, machines
    from compresskit_cli import render
    from compresskit_cli.files import check_file, write_file

    if machine is None and not measure:
        rows = [(made.name, made.about) for made in machines().values()]
        if as_json:
            click.echo(json.dumps([{"name": name, "about": about} for name, about in rows], indent=1))
        else:
            render.table("Machines", ("machine", "what was measured"), rows)
            render.say("compresskit machines MACHINE prints one, --measure makes one of this machine.")
        return
    if output is not None:
        check_file(output, force=force, kind="TOML")
    measured = _measured(dtype or "float32", device or "cpu", output) if measure else None
    made = find(machine or "") if measured is None else measured.machine
    if output is not None:
        write_file(output, machine_text(made))
    if as_json:
        near = {kind: dataclasses.asdict(value) for kind, value in measured.closeness.items()} if measured else {}
        click.echo(json.dumps({**machine_to_data(made), **({"closeness": near} if measured else {})}, indent=1))
        return
    if output is None:
        click.echo(machine_text(made), nl=False)
    if measured is not None:
        _print(measured)
    if output is not None:
        render.say(f"Written to {output}; use it with: compresskit compress ... --machine {output}")


def _measured(dtype: str, device: str, output: Path | None) -> "Measured":
    from compresskit import Progress
    from compresskit.machines import measure_machine
    from compresskit_cli import render

    name = "mine" if output is None else output.stem
    with render.progress_bar() as show:

        def on_round(done: int, total: int) -> None:
            show(Progress("measure", "rounds", done, total))

        return measure_machine(name, dtype, device=device, on_round=on_round)


def _print(measured: "Measured") -> None:
    from compresskit_cli import render

    rows = [
        (kind, c.number, f"{c.off_median:.2f}", f"{c.off_90:.2f}", c.faster_but_slower)
        for kind, c in measured.closeness.items()
    ]
    columns = ("layers", "number", "off by, median", "nine of ten", "slower though expected faster")
    render.table("Predicted against measured times", columns, rows)
