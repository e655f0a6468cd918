"""`compresskit compress`: what it writes, what it says, and what each option does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import compresskit
from compresskit.hub import load_model, read_map
from compresskit_cli import render
from tests.cli.conftest import Cli, fingerprint, hidden

QUERY = "encoder.layer.0.attention.self.query"
REPORT = {
    *(
        "output",
        "disk_bytes_before",
        "disk_bytes_after",
        "peak_memory_bytes",
        "compress_time_s",
        "time_s",
        "gap",
        "target",
    ),
    *("ratio", "site_ratio", "body_ratio", "bytes_ratio", "macs_ratio", "relative_error", "sites", "left"),
    *("coverage", "expected_speedup", "measured"),
    *("weighted_error", "corrected_biases", "calibration", "front", "compared", "searched"),
    *("params_before", "params_after", "bytes_before", "bytes_after"),
    *("embedding_params_before", "embedding_params_after"),
}
SITE = {
    *("name", "names", "method", "structure", "params_before", "params_after", "macs_before", "macs_after"),
    *("time_ns_before", "time_ns_after", "slower"),
    *("expected_error", "relative_error", "weighted_error"),
}


def compress(cli: Cli, *arguments: object, model: str = "bert", output: str = "out") -> Any:
    """The report of `compresskit compress MODEL ... --json`."""
    outcome = cli("compress", model, *arguments, "-o", output, "--json")
    assert outcome.status == 0, outcome.err
    return outcome.json()


def structures(report: Any) -> dict[str, str]:
    return {site["name"]: site["structure"] for site in report["sites"]}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("ratio", "warned"), [(1.2, False), (12, True)])
def test_layers_of_which_little_is_left_are_named(cli: Cli, work: Path, ratio: float, warned: bool) -> None:
    report = compress(cli, "-m", "kronecker", "--ratio", ratio, output="plain")
    lost = sorted((s["relative_error"], s["name"]) for s in report["sites"] if s["relative_error"] > 0.9)
    said = cli("compress", "bert", "-m", "kronecker", "--ratio", ratio, "-o", "out").out
    assert bool(lost) is warned is ("keep less than a fifth of the energy" in said)
    if lost:
        assert f"{len(lost)} of {len(report['sites'])} layers keep less" in said
        assert f"{lost[-1][1]} {lost[-1][0]:.3f}" in said


def test_the_report_for_people(cli: Cli, work: Path) -> None:
    outcome = cli("compress", "bert", "-m", "svd", "--ratio", "4")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    columns = ["layers", "number", "structure", "params", "ratio", "error", "worst"]
    assert lines[:2] == ["Replaced layers" + lines[0][15:], lines[1]]
    assert lines[1].split() == columns
    assert any(line.startswith("encoder.layer.*.attention.self.query ") for line in lines)
    left = lines.index(next(line for line in lines if line.startswith("Left dense")))
    assert lines[left + 1].split() == ["layer", "params", "why"]
    assert "embeddings.token_type_embeddings" in lines[left + 3]
    model = load_model("bert-svd-4x")
    params = sum(parameter.numel() for parameter in model.parameters())
    for fact in (f"-> {params:,}", "ratio, whole model", "ratio, replaced layers", "bytes on disk", "time to compress"):
        assert fact in outcome.out
    assert lines[-2:] == [
        "    import compresskit, transformers",
        '    model = transformers.BertModel.from_pretrained("bert-svd-4x")',
    ]


def test_brackets_and_colons_in_names_are_no_markup(cli: Cli, work: Path) -> None:
    name = "my[bold]model:smile:"
    (work / "bert").rename(name)
    outcome = cli("compress", name, "-m", "svd", "--ratio", "4")
    assert outcome.out.count(f"{name}-svd-4x") == 2
    assert f"model        {name} " in cli("inspect", f"{name}-svd-4x").out
    assert f" {name} " in cli("plan", name, "-m", "svd", "--ratio", "4", "-o", "plan.json").out.replace("'", " ")


def test_json_is_one_document_with_numbers_that_are_those_of_the_files(cli: Cli, work: Path) -> None:
    before = fingerprint(work)
    outcome = cli("compress", "bert", "-m", "svd", "--ratio", "4", "-o", "out", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    report = outcome.json()
    assert set(report) == REPORT
    assert all(set(site) == SITE for site in report["sites"])
    dense, small = load_model("bert"), load_model("out")
    assert report["output"] == "out"
    assert report["params_before"] == sum(p.numel() for p in dense.parameters())
    assert report["params_after"] == sum(p.numel() for p in small.parameters())
    assert report["ratio"] == report["params_before"] / report["params_after"] >= 4
    assert report["disk_bytes_before"] == weight_bytes(work / "bert")
    assert report["disk_bytes_after"] == weight_bytes(work / "out")
    assert report["bytes_before"] == 4 * report["params_before"]
    assert 0 < report["relative_error"] < 1
    assert report["peak_memory_bytes"] > 1e7
    assert {name: text for name, text in fingerprint(work).items() if not name.startswith("out")} == before


def test_it_does_what_the_python_api_does(cli: Cli, work: Path) -> None:
    report = compress(cli, "-m", "kronecker", "--ratio", "3", "--set", "terms=2", "--exclude", "*embeddings*")
    model = load_model("bert")
    same = compresskit.compress(model, compresskit.Kronecker(terms=2), ratio=3, exclude="*embeddings*")
    assert structures(report) == {site.name: site.structure for site in same.sites}
    assert report["relative_error"] == pytest.approx(same.relative_error)
    torch.testing.assert_close(hidden(load_model("out")), hidden(model))


@pytest.mark.parametrize(
    ("model", "arguments", "name"),
    [
        ("bert", ["-m", "svd", "--ratio", "4"], "bert-svd-4x"),
        ("./bert/", ["-m", "svd", "--ratio", "7.7"], "bert-svd-7.7x"),
        ("bert", ["-m", "svd", "--keep", "0.25"], "bert-svd-keep0.25"),
        ("bert", ["-m", "svd", "--params", "20k"], "bert-svd-20000"),
        ("bert", ["--rule", "*=svd", "--ratio", "4"], "bert-rules-4x"),
        ("bert", ["-m", "svd", "--set", "rank=4"], "bert-svd"),
    ],
)
def test_the_default_folder_is_named_after_model_method_and_ratio(
    model: str, arguments: list[str], name: str, cli: Cli, work: Path
) -> None:
    before = set(os.listdir(work))
    assert cli("compress", model, *arguments).status == 0
    assert set(os.listdir(work)) - before == {name}


def test_the_current_folder_has_a_name_too(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work / "bert")
    assert cli("compress", ".", "-m", "svd", "--ratio", "4").status == 0
    assert (work / "bert" / "bert-svd-4x" / "config.json").is_file()


def test_dtype_is_the_dtype_of_all_that_is_stored(cli: Cli, work: Path) -> None:
    report = compress(cli, "-m", "svd", "--ratio", "4", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(work / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((work / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report["bytes_after"] == 2 * report["params_after"]
    assert load_model("out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "most"), [(["--params", "20k"], 20_000), (["--params", "0.02M"], 20_000), (["--keep", "0.25"], 0.25)]
)
def test_params_and_keep_are_upper_limits_that_are_used(
    arguments: list[str], most: float, cli: Cli, work: Path
) -> None:
    report = compress(cli, "-m", "svd", *arguments)
    limit = most if most > 1 else most * report["params_before"]
    assert 0.98 * limit <= report["params_after"] <= limit


def test_options_of_the_method_are_set(cli: Cli, work: Path) -> None:
    assert set(structures(compress(cli, "-m", "svd", "--set", "rank=4")).values()) == {"low-rank(rank=4)"}


def test_include_and_exclude_choose_the_layers(cli: Cli, work: Path) -> None:
    arguments = [
        "--include",
        "*attention*",
        "--include",
        "re:pooler[.]dense",
        "--exclude",
        "*.1.*",
        "--exclude",
        "*key",
    ]
    report = compress(cli, "-m", "svd", "--set", "rank=4", *arguments)
    attention = ("self.query", "self.value", "output.dense")
    assert list(structures(report)) == [*(f"encoder.layer.0.attention.{part}" for part in attention), "pooler.dense"]
    reasons = {refusal["name"]: refusal["reason"] for refusal in report["left"]}
    assert reasons["encoder.layer.0.attention.self.key"] == "excluded by '*key'"
    assert reasons["encoder.layer.0.output.dense"] == "no pattern includes it"


def test_rules_come_before_the_method_and_the_first_match_wins(cli: Cli, work: Path) -> None:
    rules = [r"re:.*(?=query)query=kronecker:terms=2,small=both", "*attention*=tucker"]
    report = compress(cli, "-m", "svd", "--ratio", "3", *(part for rule in rules for part in ("--rule", rule)))
    methods = {site["name"]: site["method"] for site in report["sites"]}
    assert {methods[name] for name in methods if name.endswith("query")} == {"kronecker"}
    assert {methods[name] for name in methods if name.endswith(("key", "value"))} == {"tucker"}
    assert {methods[name] for name in methods if "attention" not in name} == {"svd"}
    assert "terms=2" in structures(report)[QUERY]


def test_uniform_gives_layers_of_one_shape_one_structure(cli: Cli, work: Path) -> None:
    def kinds(*more: str) -> int:
        report = compress(cli, "-m", "kronecker", "--ratio", "3", "--include", "encoder.*", *more, "--force")
        return len(set(structures(report).values()))

    assert kinds("--uniform") == 3  # 48 x 48, 96 x 48, 48 x 96
    assert kinds() > 3


def test_max_macs_limits_the_multiply_adds(cli: Cli, work: Path) -> None:
    def macs(*more: str) -> int:
        report = compress(cli, "-m", "kronecker", "--ratio", "3", *more, "--force")
        return sum(site["macs_after"] for site in report["sites"])

    assert macs("--max-macs", "6k") <= 6000 < macs()


def test_slower_structures_only_if_allowed(cli: Cli, work: Path) -> None:
    arguments = ["compress", "bert", "-m", "kronecker", "--set", "terms=4", "--ratio", "1.3", "--include", "encoder.*"]
    allowed = cli(*arguments, "-o", "allowed", "--allow-slower")
    assert "Warning: expected to be slower than dense, as you asked for them or allowed it: encoder." in allowed.out
    sites = json.loads(cli(*arguments, "-o", "out", "--json").out)["sites"]
    assert all(site["macs_after"] <= site["macs_before"] for site in sites)


def test_the_seed_is_set_and_remembered(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    @contextmanager
    def progress() -> Iterator[Any]:
        yield lambda step: seeds.append(torch.initial_seed())

    monkeypatch.setattr(render, "progress_bar", progress)
    compress(cli, "-m", "svd", "--ratio", "4", "--seed", "7")
    assert set(seeds) == {7}
    assert read_map("out").provenance["seed"] == 7


def test_one_seed_one_result(cli: Cli, work: Path) -> None:
    for output in ("one", "two"):
        compress(cli, "-m", "svd", "--ratio", "4", "--set", "solver=randomized", "--seed", "7", output=output)
    one, two = (fingerprint(work / output) for output in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"README.md"}  # its title


def test_the_checkpoint_remembers_the_command_but_no_folder_of_this_machine(cli: Cli, work: Path) -> None:
    compress(cli, "-m", "svd", "--ratio", "4", "--exclude", "*key", model=str(work / "bert"), output=str(work / "out"))
    assert read_map("out").provenance == {
        "compresskit": compresskit.__version__,
        "model": "bert",
        "revision": None,
        "seed": 0,
        "asked": {"method": "svd", "ratio": 4.0, "exclude": ["*key"]},
    }
    assert not [file for file in (work / "out").iterdir() if str(work).encode() in file.read_bytes()]


def test_tokenizer_and_model_card_stand_beside_the_weights(cli: Cli, work: Path) -> None:
    report = compress(cli, "-m", "svd", "--ratio", "4", output="shared/name")
    folder = work / "shared" / "name"
    text = "a small model"
    original, copied = (transformers.AutoTokenizer.from_pretrained(place) for place in (work / "bert", folder))
    assert copied(text)["input_ids"] == original(text)["input_ids"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "# name\n" in card
    assert f"| parameters | {report['params_before']:,} -> {report['params_after']:,} |" in card
    assert f"| relative error of replaced weights | {report['relative_error']:.4f} |" in card
    assert "| embeddings.token_type_embeddings | fewer than 16 rows or columns |" in card


def test_force_replaces_an_earlier_output_as_a_whole(cli: Cli, work: Path) -> None:
    (work / "small" / "left-over.txt").write_text("from the earlier one")
    report = compress(cli, "-m", "svd", "--ratio", "5", "--force", output="small")
    assert not (work / "small" / "left-over.txt").exists()
    assert sum(p.numel() for p in load_model("small").parameters()) == report["params_after"]
    assert sorted(os.listdir(work)) == ["bert", "small"]


def test_an_empty_folder_is_no_earlier_output(cli: Cli, work: Path) -> None:
    (work / "out").mkdir()
    compress(cli, "-m", "svd", "--ratio", "5")
    assert (work / "out" / "config.json").is_file()


OPEN = """
import sys, torch, transformers
from safetensors.torch import save_file
import compresskit
ids = torch.arange(4, 22).view(2, 9)
with torch.no_grad():
    opened = {name: transformers.AutoModel.from_pretrained(name).eval()(input_ids=ids)[0] for name in sys.argv[1:]}
save_file(opened, "opened.safetensors")
"""


def test_the_results_open_with_automodel_in_a_new_process(cli: Cli, work: Path, models: Path) -> None:
    ways = {"bert": ("svd", "4"), "mlm": ("kronecker", "5"), "gpt2": ("tucker", "3")}
    expected = {}
    for name, (method, ratio) in ways.items():
        shutil.copytree(models / name, work / name, dirs_exist_ok=True)
        compress(cli, "-m", method, "--ratio", ratio, model=name, output=f"{name}-small")
        model = load_model(name)
        compresskit.compress(model, method, ratio=float(ratio))
        expected[f"{name}-small"] = hidden(model)
    environment = os.environ | {"PYTHONPATH": str(Path(compresskit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", OPEN, *expected], cwd=work, env=environment, check=True)
    opened = load_file("opened.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(opened[name], tensor)


def test_tied_factors_are_stored_once(cli: Cli, work: Path, models: Path) -> None:
    compress(cli, "-m", "svd", "--set", "rank=4", model=str(models / "mlm"))
    with safe_open("out/model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert {name for name in names if "word_embeddings" in name} > {"bert.embeddings.word_embeddings.left"}
    assert not {name for name in names if name.startswith("cls.predictions.decoder.") and "bias" not in name}
