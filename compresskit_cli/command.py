"""The class of every subcommand: what compresskit raises or warns of on purpose becomes a message."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click


class Command(click.Command):
    """A click command that explains errors of compresskit and of the machine; `--debug` lets them through."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        from compresskit.errors import CompresskitError  # imports torch: not before the command runs

        debug = ctx.params.pop("debug") or ctx.find_root().params.get("debug")
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.showwarning = partial(_say, otherwise=warnings.showwarning)
                return super().invoke(ctx)
        except (CompresskitError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error)) from error  # exit status 1


def _say(message: Warning | str, category: type[Warning], filename: str, *rest: Any, otherwise: Any) -> None:
    """A warning of our own as one line without the place in our code; others as they are."""
    import compresskit

    if category is UserWarning and Path(filename).is_relative_to(Path(compresskit.__file__).parent):
        click.echo(f"Warning: {message}", err=True)
    else:
        otherwise(message, category, filename, *rest)
