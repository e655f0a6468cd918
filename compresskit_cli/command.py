"""The class of every subcommand: an error that compresskit raises on purpose becomes a message, not a traceback."""

from typing import Any

import click


class Command(click.Command):
    """A click command that explains the errors of compresskit; `compresskit --debug` lets them through."""

    def invoke(self, ctx: click.Context) -> Any:
        from compresskit.errors import CompresskitError  # imports torch: not before the command runs

        try:
            return super().invoke(ctx)
        except CompresskitError as error:
            if ctx.find_root().params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error  # exit status 1
