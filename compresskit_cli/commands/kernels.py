"""`compresskit kernels`: compile what makes layers on a processor faster, or say whether it is there."""

import dataclasses
import json

import click

from compresskit_cli.command import Command


@click.command(name="kernels", cls=Command)
@click.option("--build", is_flag=True, help="Compile the kernel for this machine, if it is not there yet.")
@click.option("--force", is_flag=True, help="With --build: compile it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(build: bool, force: bool, as_json: bool) -> None:
    """Compile the kernel for layers on a processor.

    Once, with the C++ compiler of this machine, for this version of PyTorch; every process that imports compresskit
    then uses it. The smaller the layers and the fewer the tokens, the more it gains.
    """
    if force and not build:
        raise click.UsageError("--force belongs to --build")
    from compresskit import build_kernels, kernel_state
    from compresskit_cli import render

    if build:
        with render.waiting("Compiling the kernel: about half a minute"):
            build_kernels(force=force)
    state = kernel_state()
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(state), "path": str(state.path)}, indent=1))
    elif state.built:
        render.say(f"The kernel for this machine and this version of PyTorch is there and used: {state.path}")
        render.say(
            f"It computes in {' and '.join(state.types)}; layers of other types run by PyTorch's own operations."
        )
        if not state.direct:
            render.say(
                "A call takes some microseconds more than it need, for want of Python's headers (Debian: apt install "
                "python3-dev); with them, compresskit kernels --build makes it anew."
            )
    else:
        how = f"with {state.compiler}" if state.compiler else "once a C++ compiler (g++, clang++) is installed"
        render.say(
            f"There is none yet; layers run by PyTorch's own operations. compresskit kernels --build makes one {how}."
        )
