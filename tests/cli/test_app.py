"""The frame of the command line: help without torch, commands as files, exit statuses."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import compresskit
import compresskit_cli
from compresskit.errors import CheckpointError
from compresskit_cli.app import app, run
from compresskit_cli.command import Command
from tests.cli.conftest import Cli, Fails

PACKAGE = Path(compresskit_cli.__file__).parent
COMMANDS = (
    *("calibrate", "compress", "demo", "distill", "evaluate", "finetune", "inspect", "kernels", "machines"),
    *("methods", "plan", "presets"),
)
HEAVY = ("torch", "transformers", "scipy", "tensorly", "numpy", "safetensors", "huggingface_hub", "datasets", "sklearn")

HELP_OF_ALL = f"""
import sys
from compresskit_cli.app import app, run
for arguments in [[], ["--help"], ["-h"], ["--version"], *([name, "--help"] for name in app.list_commands(None))]:
    run(arguments)
print("imported:", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def python(*arguments: str, path: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, with the packages below `path` first."""
    places = os.pathsep.join([str(path), str(PACKAGE.parent)])
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path, check=False)


def commands() -> dict[str, click.Command]:
    context = click.Context(app)
    return {name: app.get_command(context, name) for name in app.list_commands(context)}


def test_no_help_imports_a_heavy_package() -> None:
    result = python("-c", HELP_OF_ALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported:\n")
    assert all(f"Usage: compresskit {name} " in result.stdout for name in COMMANDS)


def test_the_commands_are_those_that_are_documented() -> None:
    assert tuple(commands()) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_is_explained(name: str) -> None:
    command = commands()[name]
    assert command.help
    unexplained = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert unexplained == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_and_tracebacks_on_demand(name: str) -> None:
    assert {"as_json", "debug"} <= {parameter.name for parameter in commands()[name].params}


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands_in_full_sentences(option: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = cli(option)
    assert outcome.status == 0
    listed = re.findall(r"^  (\w+) +(\S.*)$", outcome.out.partition("Commands:")[2], flags=re.MULTILINE)
    assert tuple(name for name, _ in listed) == COMMANDS
    assert all(text.endswith(".") and not text.endswith("...") for _, text in listed), listed


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.status, outcome.out) == (0, f"compresskit {compresskit.__version__}\n")


def test_a_new_command_is_one_new_file(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "compresskit_cli", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "compresskit_cli" / "commands" / "greet.py").write_text(
        'import click\n\n@click.command()\ndef command():\n    """Say hello."""\n    click.echo("hello")\n'
    )
    assert re.search(
        r"^  greet +Say hello\.$", python("-m", "compresskit_cli", "-h", path=tmp_path).stdout, re.MULTILINE
    )
    assert python("-m", "compresskit_cli", "greet", path=tmp_path).stdout == "hello\n"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["compres", "bert"], "No command 'compres'. Did you mean 'compress'?"),
        (
            ["svd", "bert"],
            f"No command 'svd'. The command comes first, one of: {', '.join(COMMANDS)}.",
        ),
        (["compress", "bert", "--raito", "4"], "No such option '?:? ?'?--raito'?.*--ratio"),
        (["compress"], "Missing argument 'MODEL'"),
        (["compress", "-m", "svd", "--ratio", "4"], "Missing argument 'MODEL'"),
        (["compress", "svd", "bert", "--ratio", "4"], r"unexpected extra argument \(bert\)"),
        (["compress", "bert", "-m", "svd", "--ratio"], "Option '--ratio' requires an argument"),
        (["compress", "bert", "-m", "svd", "--ratio", "four"], "'four' is not a valid float"),
        (["compress", "bert", "-m", "svd", "--dtype", "bf16"], "'bf16' is not one of 'auto', 'float32', 'bfloat16'"),
        (["inspect"], "Missing argument 'CHECKPOINT'"),
        (["methods", "svd"], r"unexpected extra argument \(svd\)"),
    ],
)
def test_wrong_usage_has_status_2_and_a_hint(arguments: list[str], match: str, fails: Fails) -> None:
    fails(*arguments, match=match, status=2)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_command_asks_torch_for_huge_pages_unless_told_otherwise(before: str | None) -> None:
    script = f"""
import os, sys
from compresskit_cli.app import main
os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
if {before!r} is not None:
    os.environ["THP_MEM_ALLOC_ENABLE"] = {before!r}
sys.argv = ["compresskit", "--version"]
try:
    main()
finally:
    print("torch" in sys.modules, os.environ["THP_MEM_ALLOC_ENABLE"])
"""
    done = python("-c", script)
    assert done.stdout.splitlines()[-1] == f"False {before or '1'}", done.stderr  # torch reads it once, at its start


def test_debug_lets_an_error_through_wherever_it_is_written(work: Path) -> None:
    for arguments in (["--debug", "inspect", "bert"], ["inspect", "bert", "--debug"]):
        with pytest.raises(CheckpointError, match="not one that compresskit compressed"):
            run(arguments)


def test_a_process_shows_the_traceback_on_demand(work: Path) -> None:
    result = python("-m", "compresskit_cli", "inspect", str(work / "bert"), "--debug")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "CheckpointError: " in result.stderr.splitlines()[-1]


def test_an_error_of_the_machine_is_explained_too(fails: Fails) -> None:
    fails("inspect", "x" * 300, match="^Error: .*File name too long: 'xxx")
    fails("compress", "bert", "-m", "svd", "--ratio", "4", "-o", "x" * 300, match="^Error: .*File name too long")


def test_a_reader_who_leaves_early_gets_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken, (tmp_path / "err").open("w+") as errors:
        command = [sys.executable, "-m", "compresskit_cli", "--help"]
        result = subprocess.run(command, stdout=broken, stderr=errors, cwd=PACKAGE.parent, check=False)
        errors.seek(0)
        assert (result.returncode, errors.read()) == (1, "")


def test_a_command_lets_a_broken_pipe_through() -> None:
    def leave() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Command("leave", callback=leave).main([], standalone_mode=False)


@pytest.mark.parametrize("debug", [True, False])
def test_warnings_of_our_own_are_a_line_without_the_place_in_our_code(debug: bool) -> None:
    @click.command(cls=Command)
    def command() -> None:
        warnings.warn_explicit("the cache is full", UserWarning, compresskit.__file__, 1)
        warnings.warn_explicit("of another package", UserWarning, "elsewhere.py", 1)
        warnings.warn_explicit("of something old", DeprecationWarning, compresskit.__file__, 1)

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        result = CliRunner().invoke(command, ["--debug"] if debug else [])
    assert result.exit_code == 0
    assert result.stderr == ("" if debug else "Warning: the cache is full\n")
    assert [str(each.message) for each in others][-2:] == ["of another package", "of something old"]
    assert len(others) == 2 + debug
