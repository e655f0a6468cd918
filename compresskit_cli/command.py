"""The class of every subcommand: an error that compresskit raises on purpose becomes a message, not a traceback."""

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
            return super().invoke(ctx)
        except (CompresskitError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error)) from error  # exit status 1
