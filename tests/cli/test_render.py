"""Tables: names stay whole where they can, numbers stand right, and nothing in a name is taken for markup."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from compresskit import Progress
from compresskit_cli import render

NAME = "bert.encoder.layer.*.attention.output.dense"
STRUCTURE = "kronecker (left=16x16, right=48x192, terms=1)"


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: Any) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(render, "console", console)
    render.table(*arguments)
    return stream.getvalue().splitlines()


def test_the_structure_is_folded_before_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ("layers", "number", "structure", "params", "ratio", "error", "worst")
    rows = [(NAME, 12, STRUCTURE, "9,472", "62.3", "0.913", "0.920"), ("short", 1, "", "1", "62.3", "0.9", "0.920")]
    lines = printed(monkeypatch, 100, "Replaced", columns, rows)
    assert max(map(len, lines)) <= 100
    assert lines[3].startswith(f"{NAME} ")
    assert lines[3].rstrip().endswith("9,472   62.3  0.913  0.920")
    wide = printed(monkeypatch, 1000, "Replaced", columns, rows)
    assert f"{NAME}      12  {STRUCTURE}   9,472   62.3  0.913  0.920" in wide


def test_numbers_stand_right_and_texts_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 80, "T", ("layer", "params", "why"), [("a", "7", "x"), ("bb", "1,234", "longer")])
    assert [line.rstrip() for line in lines[1:]] == [
        *("layer  params  why", "─────────────────────", "a           7  x", "bb      1,234  longer", "")
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_868_376, "90.9 MB"), (2.5e9, "2.5 GB"), (3e13, "30000.0 GB")],
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert render.size(num_bytes) == text


def test_the_progress_bar_shows_layer_error_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True, markup=False)
    monkeypatch.setattr(render, "progress_console", console)
    with render.progress_bar() as show:
        show(Progress("analyse", "pooler.dense", 1, 1))
        show(Progress("fit", "encoder.layer.0.query", 1, 2, 0.25))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"analysing .* 1/1 \d:\d\d:\d\d pooler\.dense", shown)
    assert re.search(r"fitting .* 1/2 -:--:-- error 0\.250  encoder\.layer\.0\.query", shown)


def test_no_progress_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(render, "progress_console", Console(file=stream, width=120))
    with render.progress_bar() as show:
        show(Progress("fit", "encoder.layer.0.query", 1, 2, 0.25))
    assert stream.getvalue() == ""
