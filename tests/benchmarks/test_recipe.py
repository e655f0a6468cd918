"""Recipes on tasks: what runs share, and what is skipped."""

import json

import pytest

from benchmarks.experiments import ExperimentSkipped, SuiteError, make_experiment
from benchmarks.recipes import Workshop
from compresskit import recipes

BASE = {"kind": "recipe", "preset": "svd-kd", "ratio": 2, "task": "mrpc"}


def key(**changes):
    return make_experiment({**BASE, **changes})._stage_1_key()


def test_tasks_share_the_student_of_the_first_stage_and_nothing_else_does():
    assert key() == key(task="rte") == key(settings=["task.lr=1e-3"])
    others = [
        key(first="teacher", before="mnli"),
        *(key(ratio=4), key(seed=1), key(preset="tucker-kd"), key(texts="own"), key(dtype="bfloat16")),
        key(settings=["corpus.max_steps=5"]),
    ]
    by_teachers = [key(first="teacher"), key(first="teacher", task="rte")]
    assert len({key(), *others, *by_teachers}) == 1 + len(others) + len(by_teachers)


@pytest.mark.parametrize(("first", "source"), [("base", "model-tiny-0"), ("teacher", "teacher-own")])
def test_the_teacher_of_a_task_may_teach_the_first_stage(first, source, tmp_path, monkeypatch):
    taught = []

    def distill(preset, teacher, run, **how):
        taught.append((teacher.name, "corpus" in how, "task" in how))
        return recipes.distill(preset, teacher, run, **how)

    monkeypatch.setattr("benchmarks.recipes.distill", distill)
    settings = ["task.max_steps=1", "task.batch_size=4"]
    settings += ["corpus.max_steps=1", "corpus.batch_size=4", "corpus.max_length=32"]
    own = {"task": "own", "texts": "own", "model": "tiny", "settings": settings, "first": first}
    figures = make_experiment({**BASE, **own}).run_in(None, tmp_path).figures
    assert taught == [(source, True, False), ("teacher-own", False, True)]
    assert figures["stage_1"]["parameters"] < figures["teacher_parameters"]


def test_a_teacher_is_made_once_and_goes_on_where_it_was(tmp_path):
    shop = Workshop(tmp_path, None, "tiny", 0, "float32")
    settings = {"max_steps": 2, "batch_size": 4, "eval_steps": 1}
    folder = shop.teacher("own", settings)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert shop.teacher("own", settings) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks", "model-tiny-0", "own-task", "teacher-own"]


def test_a_teacher_may_learn_another_task_before_its_own(tmp_path):
    """It then starts from that model, with a head of its own."""
    rows = [
        {"premise": f"text {n}", "hypothesis": f"text {n + n % 3}", "label": ("a", "b", "c")[n % 3]} for n in range(808)
    ]
    (tmp_path / "glue" / "MNLI").mkdir(parents=True)
    (tmp_path / "glue" / "MNLI" / "dev_matched.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rte = tmp_path / "glue" / "RTE"
    rte.mkdir()
    pairs = "".join(f"{n}\tone {n}\ttwo\t{('', 'not_')[n % 2]}entailment\n" for n in range(8))
    for split in ("train", "dev"):
        (rte / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{pairs}", encoding="utf-8")
    shop = Workshop(tmp_path / "work", tmp_path, "tiny", 0, "float32")
    teacher = shop.teacher("rte", {"max_steps": 1, "batch_size": 4}, "mnli")
    assert teacher.name == "teacher-rte-after-mnli"
    before = json.loads((shop.work / "before-mnli" / "config.json").read_text("utf-8"))
    after = json.loads((teacher / "config.json").read_text("utf-8"))
    assert sorted(before["label2id"]) == ["a", "b", "c"]
    assert sorted(after["label2id"]) == ["entailment", "not_entailment"]
    assert len((shop.work / "before-mnli-data" / "dev.jsonl").read_text("utf-8").splitlines()) == 800


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ExperimentSkipped, "give the folder that holds glue/ and text/ with --data"),
        ({"stages": "three"}, SuiteError, "stages is two or one, got 'three'"),
        ({"before": "snli"}, SuiteError, "before is nothing or one of mnli, got 'snli'"),
        ({"first": "both"}, SuiteError, "first is base or teacher, with two stages; got 'both'"),
        ({"first": "teacher", "stages": "one"}, SuiteError, "with two stages"),
    ],
)
def test_what_cannot_run_says_why(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_experiment({**BASE, **changes}).run_in(None, tmp_path)
    assert not any(tmp_path.iterdir())
