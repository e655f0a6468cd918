"""The `compresskit` command: finds its subcommands as files, and turns errors into exit statuses."""

import difflib
import importlib
import pkgutil
import sys

import click

import compresskit_cli.commands as commands

INTERRUPTED = 130


class CommandFiles(click.Group):
    """A group whose subcommands are the files of `compresskit_cli.commands`; only the one that runs is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        known = self.list_commands(ctx)
        if cmd_name not in known:
            near = difflib.get_close_matches(cmd_name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No command {cmd_name!r}.{hint}")
        command = importlib.import_module(f"{commands.__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"compresskit {version('compresskit')}")
        ctx.exit()


@click.group(cls=CommandFiles, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print it.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Make transformers smaller by decomposing their weights, into ordinary Hugging Face checkpoints."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit status of `compresskit ARGUMENTS`."""
    try:
        status = app.main(arguments, prog_name="compresskit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted: nothing was written.", err=True)
        return INTERRUPTED
    return status if isinstance(status, int) else 0
