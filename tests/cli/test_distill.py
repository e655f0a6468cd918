"""`compresskit distill` and `compresskit presets`: a student from a command, its preset edited, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import compresskit
import compresskit.tasks as tasks
from compresskit_cli.training import ProgressLines
from tests.cli.conftest import Cli, Fails, fingerprint
from tests.recipes.conftest import base, reviews, teacher, text  # noqa: F401 - fixtures

FEW = ("--max-steps", "3", "--stage1-steps", "3", "--batch-size", "8", "--stage1-batch-size", "8", "--device", "cpu")
SHORT = (*FEW, "--set", "corpus.max_length=32")
ASKED = ("distill", "--preset", "kroneckerbert:k8", "--teacher", "teacher", "--task", "sst2", "--data", "data")


@pytest.fixture
def place(work: Path, base: Path, teacher: Path, reviews: Path, text: Path) -> Path:  # noqa: F811
    for name, folder in (("base", base), ("teacher", teacher), ("data", reviews), ("text", text)):
        shutil.copytree(folder, work / name)
    return work


def test_a_student_is_made_from_text_and_task(cli: Cli, place: Path, kept: list[bool]) -> None:
    made = cli(*ASKED, "--base", "base", "--corpus", "text", *SHORT, "-o", "student", "--json")
    assert made.status == 0, made.err
    assert kept == [True]
    found = made.json()
    assert [stage["name"] for stage in found["stages"]] == ["corpus", "task"]
    assert found["ratio"] == pytest.approx(found["teacher_parameters"] / found["parameters"])
    log = [json.loads(line) for line in Path("student/distillation.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {"corpus", "task"}
    assert any({"loss_logits", "tokens_per_s", "time_left_s", "examples_per_s"} <= set(line) for line in log)
    card = Path("student/README.md").read_text()
    for said in ("kroneckerbert:k8", "NAACL 2022", "import compresskit", "| teacher | teacher |", "max_steps 3"):
        assert said in card
    scored = cli("evaluate", "student", "--task", "sst2", "--data", "data", "--json").json()
    assert scored["metrics"] == found["metrics"]
    assert scored["parameters"] == found["parameters"]
    assert not list(place.glob("*.run"))

    again = cli(*ASKED[:1], "--preset", "student/preset.toml", *ASKED[3:], *("-o", "again", "--json", "--base", "base"))
    assert again.status == 0, again.err  # the preset beside a student makes it again; without the corpus here
    assert [stage["steps"] for stage in again.json()["stages"]] == [3]


def test_the_screen_says_what_is_left_out_and_what_came_out(cli: Cli, place: Path) -> None:
    shown = cli(*ASKED, *SHORT, "-o", "student")
    assert shown.status == 0, shown.err
    assert "no corpus: stage 1 is left out, this is the one-stage ablation" in shown.err
    assert "dev accuracy" in shown.out
    assert "before training" in shown.out
    assert "stage task" in shown.out


def test_sentence_embeddings_are_distilled_without_a_head(cli: Cli, place: Path) -> None:
    asked = ("distill", "--preset", "svd-kd", "--ratio", "2", "--teacher", "base", "--task", "sts", "--data", "data")
    made = cli(*asked, "--corpus", "text", *SHORT, "--eval-steps", "2", "-o", "tiny", "--json")
    assert made.status == 0, made.err
    assert [step for step, _ in made.json()["stages"][0]["curve"]] == [2, 3]
    assert json.loads(Path("tiny/config.json").read_text())["architectures"] == ["BertModel"]


def test_a_preset_is_listed_printed_edited_and_passed_back(cli: Cli, place: Path) -> None:
    listed = cli("presets", "--json").json()
    assert {"kroneckerbert:k8", "small-dense"} <= {row["name"] for row in listed}
    assert "kroneckerbert:k21" in cli("presets").out
    printed = cli("presets", "kroneckerbert:k21").out
    assert 'variant = "k21"' in printed
    assert "# table 8" in printed
    assert cli("presets", "svd-kd", "-o", "my.toml").status == 0
    Path("my.toml").write_text(Path("my.toml").read_text().replace("[compress]", "[compress]\nratio = 2"))
    made = cli("distill", "--preset", "my.toml", *ASKED[3:], *SHORT, "-o", "student", "--json")
    assert made.status == 0, made.err
    assert made.json()["ratio"] >= 2


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (("presets", "kroneckerbert:k80"), 1, "no variant 'k80'; did you mean 'k8'"),
        (("presets", "-o", "x.toml"), 2, "--output belongs to one preset"),
        (("presets", "svd-kd", "-o", "nowhere/x.toml"), 1, "there is no folder 'nowhere'"),
        ((*ASKED, "-o", "x", "--set", "task.lrr=1"), 1, "task has no key 'lrr'; did you mean 'lr'"),
        ((*ASKED, "-o", "x", "--set", "task.lr"), 2, "--set takes KEY=VALUE"),
        ((*ASKED, "-o", "x", "--lr", "-1"), 1, r"task: lr is -1\.0; a number above 0"),
        ((*ASKED, "-o", "x", "--corpus", "data"), 1, r"there is no \*\.txt in data"),
        ((*ASKED, "-o", "x", "--ratio", "900"), 1, "the highest ratio that these rules reach is"),
        ((*ASKED, "-o", "x", "--resume"), 1, "there is no run to resume"),
        ((*ASKED, "-o", "teacher", "--force"), 1, "teacher holds the model that is to be trained"),
        ((*ASKED, "-o", "data", "--force"), 1, "holds something else than a model"),
        ((*ASKED[:5], "--task", "mnli", "--data", "data", "-o", "x"), 1, "has 3 labels .*, the model 2"),
        ((*ASKED[:5], "-o", "x"), 1, "there is nothing to train on"),
        (
            ("distill", "--preset", "matrix-decomposition", *ASKED[3:], "--stage1-lr", "1", "-o", "x"),
            2,
            "no such stage",
        ),
    ],
)
def test_what_cannot_be_is_explained_and_leaves_nothing(
    arguments: tuple[str, ...], status: int, match: str, place: Path, fails: Fails
) -> None:
    fails(*arguments, match=match, status=status)


DISTILL = """
import sys, time
import compresskit.tasks as tasks
from compresskit_cli.app import main
plain = tasks.ProgressCallback.on_step_end
def on_step_end(self, args, state, control, **more):
    plain(self, args, state, control, **more)
    if "task" in args.output_dir and state.global_step == 3:
        print("waiting", flush=True)
        time.sleep(60)
tasks.ProgressCallback.on_step_end = on_step_end
main()
"""


def test_an_interrupted_command_resumes_to_the_same_bits(cli: Cli, place: Path) -> None:
    """Interrupted in the second stage as by Ctrl-C, in a process of its own; then finished by --resume."""
    asked: tuple[Any, ...] = (*ASKED, "--corpus", "text", *SHORT, "--max-steps", "4", "--eval-steps", "2")
    assert cli(*asked, "-o", "whole").status == 0
    root = Path(compresskit.__file__).parents[1]
    own = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    environment = own | {"COMPRESSKIT_CACHE": os.environ["COMPRESSKIT_CACHE"]}  # no kernel of the machine's
    start = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + DISTILL]
    with subprocess.Popen(
        [*start, *asked, "-o", "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "the same command with --resume goes on" in err
    assert not Path("cut").exists()
    assert cli(*asked, "-o", "cut", "--resume").status == 0
    assert fingerprint(Path("cut"))["model.safetensors"] == fingerprint(Path("whole"))["model.safetensors"]
    assert not Path("cut.run").exists()
    student = tasks.model_for(tasks.find_task("sst2"), "cut")
    assert isinstance(student, transformers.BertForSequenceClassification)


def test_a_log_gets_a_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 10.0, 70.0, 80.0])
    lines = ProgressLines(60.0, clock=lambda: next(seconds))
    for step in (1, 31, 36):
        lines("corpus", tasks.TrainProgress(step, 91, 0.5, 2.0, 8.0, {"f1": 0.5}, {"logits": 1.5, "task": 0.5}))
    assert capfd.readouterr().err == (
        "corpus 31/91, 2 min left  epoch 0.50  loss 2.0000 (logits 1.5, task 0.5)  8 examples/s  f1 0.5000\n"
    )
