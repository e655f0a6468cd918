"""What the README says is run: its Python, its commands, its options."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from compresskit_cli.app import app

ROOT = Path(__file__).parents[1]
README = "\n".join((ROOT / name).read_text("utf-8") for name in ("README.md", "benchmarks/README.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    (compresskit .*)$", README, re.MULTILINE)
TABLE = re.findall(r"^\| `compresskit (\w+)[^`]*` \| (.*) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_is_python_of_about_ten_lines() -> None:
    assert BLOCKS
    assert len(BLOCKS[0].strip().splitlines()) <= 14


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """`--help` at the end: the options before it must exist, and nothing is run."""
    words = shlex.split(line.split("#")[0])[1:]
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("name", "text"), TABLE)
def test_the_table_names_options_that_exist(name: str, text: str) -> None:
    usage = CliRunner().invoke(app, [name, "--help"]).output
    for option in set(re.findall(r"--[a-z-]+", text)):
        assert option in usage, f"compresskit {name} has no {option}"


def test_every_command_is_in_the_table() -> None:
    with app.make_context("compresskit", ["--help"], resilient_parsing=True) as context:
        assert sorted(name for name, _ in TABLE) == app.list_commands(context)
