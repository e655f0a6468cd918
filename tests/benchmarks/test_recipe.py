"""Recipes on tasks: what runs share, and what is skipped."""

import pytest

from benchmarks.experiments import ExperimentSkipped, SuiteError, make_experiment
from benchmarks.recipes import Workshop

BASE = {"kind": "recipe", "preset": "svd-kd", "ratio": 2, "task": "mrpc"}


def key(**changes):
    return make_experiment({**BASE, **changes})._stage_1_key()


def test_tasks_share_the_student_of_the_first_stage_and_nothing_else_does():
    assert key() == key(task="rte") == key(settings=["task.lr=1e-3"])
    others = [
        *(key(ratio=4), key(seed=1), key(preset="tucker-kd"), key(texts="own"), key(dtype="bfloat16")),
        key(settings=["corpus.max_steps=5"]),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_a_teacher_is_made_once_and_goes_on_where_it_was(tmp_path):
    shop = Workshop(tmp_path, None, "tiny", 0, "float32")
    settings = {"max_steps": 2, "batch_size": 4, "eval_steps": 1}
    folder = shop.teacher("own", settings)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert shop.teacher("own", settings) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks", "model-tiny-0", "own-task", "teacher-own"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ExperimentSkipped, "give the folder that holds glue/ and text/ with --data"),
        ({"stages": "three"}, SuiteError, "stages is two or one, got 'three'"),
    ],
)
def test_what_cannot_run_says_why(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_experiment({**BASE, **changes}).run_in(None, tmp_path)
    assert not any(tmp_path.iterdir())
