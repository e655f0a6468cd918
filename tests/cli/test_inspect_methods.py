"""`compresskit inspect` and `compresskit methods`: what they print is what is there."""

from pathlib import Path

import pytest

from compresskit import decomposition, layout_of, methods
from compresskit.hub import load_model
from tests.cli.conftest import Cli, fingerprint

DECODER, TABLE = "cls.predictions.decoder", "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(("family", "method"), [("bert", "kronecker"), ("mlm", "svd"), ("gpt2", "tucker")])
def test_the_numbers_are_those_of_the_model(family: str, method: str, cli: Cli, work: Path, models: Path) -> None:
    report = cli("compress", models / family, "-m", method, "--ratio", "3", "-o", "out", "--json").json()
    outcome = cli("inspect", "out", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    found, model = outcome.json(), load_model("out")
    assert set(found) == {
        *("architecture", "format_version", "sites", "params", "dense_params", "weight_bytes", "provenance", "ratio")
    }
    assert found["architecture"] == type(model).__name__
    assert found["format_version"] == 1
    assert found["params"] == sum(p.numel() for p in model.parameters()) == report["params_after"]
    assert found["dense_params"] == sum(p.numel() for p in load_model(models / family).parameters())
    assert found["ratio"] == report["ratio"]
    assert found["weight_bytes"] == (work / "out" / "model.safetensors").stat().st_size
    assert found["provenance"]["asked"] == {"method": method, "ratio": 3.0}
    layout = {name: entry.structure.to_json() for name, entry in layout_of(model).items()}
    assert {site["name"]: site["structure"] for site in found["sites"]} == layout


def test_the_tables_for_people(cli: Cli, work: Path, models: Path) -> None:
    assert cli("compress", models / "mlm", "-m", "svd", "--set", "rank=4", "-o", "out").status == 0
    before = fingerprint(work)
    outcome = cli("inspect", "out")
    assert (outcome.status, outcome.err) == (0, "")
    assert fingerprint(work) == before
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[1] == ["layer", "weight", "structure", "params", "ratio"]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows[DECODER] == ["120", "x", "48", "shared", "with", TABLE]
    assert rows[TABLE] == ["120", "x", "48", "low-rank", "(rank=4)", "672", "8.6"]
    assert ["architecture", "BertForMaskedLM"] in lines
    assert ["made", "with:", "asked", "method", "svd,", "settings", "rank=4"] in lines


def test_methods_are_those_of_the_registry(cli: Cli) -> None:
    outcome = cli("methods", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    listed = {method["name"]: method for method in outcome.json()}
    assert list(listed) == list(methods())
    for name, cls in methods().items():
        assert (listed[name]["summary"], listed[name]["source"]) == (cls.summary, cls.source)
        assert all(set(option) == {"type", "default"} for option in listed[name]["options"].values())
        defaults = {key: option["default"] for key, option in listed[name]["options"].items()}
        assert decomposition(name, defaults) == cls()


def test_methods_for_people(cli: Cli) -> None:
    outcome = cli("methods")
    assert (outcome.status, outcome.err) == (0, "")
    for name, cls in methods().items():
        assert f"{name}\n    {cls.summary}\n    source: {cls.source}\n" in outcome.out
    assert "    --set terms=1  (integer)\n" in outcome.out
    assert "    --set rank=none  (integer or none)\n" in outcome.out
