"""The `compresskit` command: finds its subcommands as files, and turns errors into exit statuses."""

import difflib
import importlib
import importlib.util
import os
import pkgutil
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import click

import compresskit_cli.commands as commands

BROKEN_PIPE, INTERRUPTED, TERMINATED = 1, 130, 143


class CommandFiles(click.Group):
    """A group whose subcommands are the files of `compresskit_cli.commands`; only the one that runs is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        known = self.list_commands(ctx)
        if cmd_name not in known:
            near = difflib.get_close_matches(cmd_name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The command comes first, one of: {', '.join(known)}."
            ctx.fail(f"No command {cmd_name!r}. {hint}")
        command = importlib.import_module(f"{commands.__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        package = importlib.util.find_spec("compresskit")  # an import would take torch along
        assert package is not None
        assert package.origin is not None
        found = runpy.run_path(str(Path(package.origin).with_name("version.py")))
        click.echo(f"compresskit {found['__version__']}")
        ctx.exit()


@click.group(cls=CommandFiles, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Make transformers smaller by decomposing their weights, into ordinary Hugging Face checkpoints."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 an error that was explained, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)  # `kill` and batch systems: leave nothing half written either
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch then has large tensors in huge pages: fits 8 % faster
    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


def run(arguments: list[str]) -> int:
    """The exit status of `compresskit ARGUMENTS`."""
    try:
        status = app.main(arguments, prog_name="compresskit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted: no half-written output is left.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in `compresskit methods --json | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return BROKEN_PIPE
    return status if isinstance(status, int) else 0
