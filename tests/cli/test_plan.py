"""`compresskit plan`: what it shows and writes, and that an edited plan is what `compress --plan` does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compresskit.hub import load_model, read_map
from tests.cli.conftest import Cli, Fails, fingerprint

QUERY, KEY = "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.key"


def edit(file: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture
def plan_file(cli: Cli, work: Path) -> Path:
    assert cli("plan", "bert", "-m", "svd", "--ratio", "4", "-o", "plan.json").status == 0
    return work / "plan.json"


def test_the_table_for_people(cli: Cli, work: Path) -> None:
    before = fingerprint(work)
    outcome = cli("plan", "bert", "-m", "svd", "--ratio", "2", "--exclude", "*.0.*")
    assert (outcome.status, outcome.err) == (0, "")
    assert fingerprint(work) == before
    lines = outcome.out.splitlines()
    assert lines[1].split() == ["layer", "weight", "structure", "params", "ratio", "MACs", "speed-up", "error"]
    row = next(line for line in lines if line.startswith("encoder.layer.1.intermediate.dense ")).split()
    assert row[1:4] == ["96", "x", "48"]
    rank, params = int(row[5].removeprefix("(rank=").removesuffix(")")), 144
    assert row[6:9] == [f"{rank * params:,}", f"{96 * 48 / (rank * params):.1f}", f"{rank * params:,}"]
    assert 0.5 < float(row[9]) < 3
    assert 0 < float(row[10]) < 1
    head = lines.index(next(line for line in lines if line.startswith("Expected time")))
    assert lines[head + 1].split() == ["layers", "number", "dense", "ms", "planned", "ms", "speed-up"]
    group = next(line for line in lines[head:] if line.startswith("encoder.layer.*.intermediate.dense")).split()
    assert float(group[2]) / float(group[3]) == pytest.approx(float(group[4]), rel=0.1)
    assert "Expected speed-up of these layers together: " in outcome.out
    assert "Warning" not in outcome.out
    assert "excluded by '*.0.*'" in outcome.out
    assert "Whole model: 48,144 -> 24,0" in outcome.out


def test_json_is_one_document(cli: Cli, work: Path) -> None:
    outcome = cli("plan", "bert", "-m", "svd", "--ratio", "4", "--json", "-o", "plan.json")
    assert (outcome.status, outcome.err) == (0, "")
    made = outcome.json()
    assert made == json.loads((work / "plan.json").read_text())
    assert set(made) == {
        *("format_version", "num_params", "params_after", "ratio", "gap", "target", "coverage", "sites", "left_dense"),
        *("expected_speedup", "front", "compared", "searched"),
    }
    assert made["ratio"] == made["num_params"] / made["params_after"] >= 4
    numbers = {"params", "dense_params", "macs", "dense_macs", "expected_error", "expected_speedup"}
    assert all(set(site) == {"name", "method", "options", "structure"} | numbers for site in made["sites"])


def test_a_replayed_plan_gives_what_was_planned(plan_file: Path, cli: Cli, work: Path) -> None:
    planned = json.loads(plan_file.read_text())
    replayed = cli("compress", "bert", "--plan", "plan.json", "--json").json()
    direct = cli("compress", "bert", "-m", "svd", "--ratio", "4", "--json").json()
    assert replayed["output"] == "bert-plan"
    assert replayed["params_after"] == planned["params_after"] == direct["params_after"]
    assert [(s["name"], s["structure"]) for s in replayed["sites"]] == [
        (s["name"], s["structure"]) for s in direct["sites"]
    ]
    assert read_map("bert-plan").provenance["asked"] == {"plan": "plan.json"}


def test_an_edited_plan_gives_the_edited_structures(plan_file: Path, cli: Cli, work: Path) -> None:
    def change(plan: Any) -> None:
        plan["sites"] = [site for site in plan["sites"] if site["name"] != KEY]
        next(site for site in plan["sites"] if site["name"] == QUERY)["structure"]["rank"] = 3

    edit(plan_file, change)
    report = cli("compress", "bert", "--plan", "plan.json", "-o", "out", "--json").json()
    layout = {site["name"]: site["structure"] for site in cli("inspect", "out", "--json").json()["sites"]}
    assert layout[QUERY]["rank"] == 3
    assert KEY not in layout
    assert {"name": KEY, "num_params": 48 * 48, "reason": "not in the plan"} in report["left"]
    assert sum(p.numel() for p in load_model("out").parameters()) == report["params_after"]


def test_it_says_how_to_replay_even_for_names_with_spaces(cli: Cli, work: Path) -> None:
    (work / "bert").rename(work / "my bert")
    outcome = cli("plan", "my bert", "-m", "svd", "--ratio", "4", "-o", "my plan.json")
    last = outcome.out.splitlines()[-1]
    assert last.endswith("replay it with: compresskit compress 'my bert' --plan 'my plan.json'")


def test_force_replaces_an_earlier_plan(plan_file: Path, cli: Cli, fails: Fails) -> None:
    earlier = plan_file.read_text()
    fails("plan", "bert", "-m", "svd", "--ratio", "5", "-o", "plan.json", match="'plan.json' exists; --force replaces")
    assert cli("plan", "bert", "-m", "svd", "--ratio", "5", "-o", "plan.json", "--force").status == 0
    assert plan_file.read_text() != earlier


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("bert", "'bert' is a folder; give the name of a JSON file"),
        ("nowhere/plan.json", "'nowhere/plan.json' cannot be written: there is no folder 'nowhere'"),
        ("bert/config.json/plan.json", "there is no folder 'bert/config.json'"),
        ("/proc/plan.json", "'/proc/plan.json' cannot be written: "),
    ],
)
def test_a_place_where_no_plan_can_be_written(output: str, match: str, fails: Fails) -> None:
    fails("plan", "bert", "-m", "svd", "--ratio", "4", "-o", output, "--force", match=match)


def site(plan: Any, name: str = QUERY) -> Any:
    return next(site for site in plan["sites"] if site["name"] == name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda plan: plan.pop("sites"), "a plan is a JSON object with a list 'sites'"),
        (lambda plan: plan.update(sites=[]), "a plan is a JSON object with a list 'sites' that is not empty"),
        (lambda plan: plan.update(format_version=2), "this plan has format version 2, this release reads 1"),
        (lambda plan: plan["sites"].append(site(plan)), f"names these sites twice: {QUERY}"),
        (lambda plan: site(plan).update(name="encoder.query"), "the plan names 'encoder.query', which this model does"),
        (lambda plan: site(plan).update(method="svdd"), "no decomposition is called 'svdd'; did you mean 'svd'"),
        (lambda plan: site(plan).update(options={"rnak": "3"}), "svd has no option 'rnak'"),
        (lambda plan: site(plan).update(structure="low-rank"), "each site of a plan has 'name', 'method' and"),
        (lambda plan: site(plan)["structure"].update(kind="high-rank"), "unknown structure kind 'high-rank'"),
        (lambda plan: site(plan)["structure"].update(rank=-3), "the size 'rank' of a structure is -3"),
        (lambda plan: site(plan)["structure"].update(rows=12), f"'{QUERY}' is 48 x 48; the plan's structure is for"),
        (lambda plan: site(plan).update(method="kronecker", options={}), "kronecker does not fit structures of kind"),
        (
            lambda plan: site(plan).update(name="embeddings.token_type_embeddings"),
            "which is left alone: fewer than 16 rows or columns",
        ),
    ],
)
def test_a_plan_that_does_not_fit(change: Callable[[Any], object], match: str, plan_file: Path, fails: Fails) -> None:
    edit(plan_file, change)
    fails("compress", "bert", "--plan", "plan.json", "-o", "small", "--force", match=match)


def test_a_plan_of_another_model(plan_file: Path, models: Path, fails: Fails) -> None:
    fails("compress", models / "gpt2", "--plan", plan_file, "-o", "small", "--force", match="which this model does not")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "the plan 'plan.json' cannot be read as JSON: .*No such file"),
        (b"{", "the plan 'plan.json' cannot be read as JSON: Expecting property name"),
        (b"\xff\xfe", "the plan 'plan.json' cannot be read as JSON: 'utf-8' codec"),
        (b"[1]", "a plan is a JSON object with a list 'sites'"),
    ],
)
def test_a_plan_that_is_none(text: bytes | None, match: str, fails: Fails, work: Path) -> None:
    if text is not None:
        (work / "plan.json").write_bytes(text)
    fails("compress", "bert", "--plan", "plan.json", "-o", "small", "--force", match=match)


@pytest.mark.parametrize("more", [["-m", "svd"], ["--ratio", "4"], ["--exclude", "*key"], ["--uniform"]])
def test_a_plan_says_it_all(more: list[str], plan_file: Path, fails: Fails) -> None:
    fails("compress", "bert", "--plan", "plan.json", *more, match="give no method, budget or pattern with it", status=2)


def test_auto_says_what_it_chose_and_what_the_others_would_do(cli, work):
    options = ("plan", "bert", "-m", "auto", "--set", "methods=svd+kronecker", "--ratio", "2", "--allow-slower")
    made = cli(*options, "--json").json()
    assert {site["method"] for site in made["sites"]} <= {"svd", "kronecker"}
    assert all(set(site["alternatives"]) <= {"svd", "kronecker"} for site in made["sites"])
    errors = [point["error"] for point in made["front"]]
    assert len(errors) > 2
    assert errors == sorted(errors, reverse=True)
    shown = cli(*options).out
    assert "best of the others" in shown
    assert "Front" in shown
    assert "from the least possible loss" in shown


@pytest.mark.parametrize("limit", [("--ratio", "2"), ("--ratio", "1.5", "--max-macs", "20k")])
def test_the_front_is_drawn(limit, cli, fails, work):
    options = ("plan", "bert", "-m", "svd", *limit, "--plot", "front.svg")
    assert cli(*options).status == 0
    root = ElementTree.parse(work / "front.svg").getroot()
    points = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(points) > 2
    assert sum(point.get("fill") != "#fff" for point in points) == 1
    heights = [float(point.get("cy")) for point in points]
    assert heights == sorted(heights)
    fails(*options, match="exists; --force replaces it")


def test_one_structure_per_layer_is_no_front(fails, work):
    options = ("plan", "bert", "-m", "svd", "--set", "rank=2", "--plot", "front.svg")
    fails(*options, match="no front to draw")
