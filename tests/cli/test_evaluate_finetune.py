"""`compresskit finetune` and `compresskit evaluate`: a teacher, a compressed student, and what they refuse."""

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
from compresskit.core import native_build
from tests.cli.conftest import Cli, Fails, fingerprint
from tests.tasks.conftest import WORDS, tiny_config

FAST = ("--lr", "3e-3", "--batch-size", "8", "--device", "cpu")
FRAMES = ("{} film", "a very {} film", "we saw a {} film", "the film is {}", "the film was very {} .", "is {} !")
ROWS = [(frame.format(word), label) for frame in FRAMES for word, label in (("good", 1), ("bad", 0))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    transformers.set_seed(0)
    transformers.BertModel(tiny_config()).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocab, model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture
def place(work: Path, encoder: Path) -> Path:
    """The working directory with `encoder`, and `data` in SST-2's layout."""
    shutil.copytree(encoder, work / "encoder")
    (work / "data").mkdir()
    for split, times in (("train", 6), ("dev", 1)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in ROWS * times)]
        (work / "data" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return work


@pytest.fixture(scope="module")
def teacher(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has not learned anything."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    transformers.set_seed(0)
    tasks.model_for(tasks.find_task("sst2"), encoder, new_head=True).save_pretrained(folder)
    tasks.tokenizer_for(encoder).save_pretrained(folder)
    return folder


def test_a_teacher_is_made_compressed_trained_again_and_compared(cli: Cli, place: Path) -> None:
    asked = ("--task", "sst2", "--data", "data")
    made = cli("finetune", "encoder", *asked, "-o", "teacher", *FAST, "--epochs", "6", "--json")
    assert made.status == 0, made.err
    found = made.json()
    assert found["metrics"] == {"accuracy": 1.0}
    assert (found["num_train"], found["num_dev"], found["steps"]) == (72, 12, 54)
    log = [json.loads(line) for line in Path("teacher/training.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in log)
    card = Path("teacher/README.md").read_text()
    assert "| dev accuracy | 1.0000 |" in card
    assert "| tokens of an input at most | 64 |" in card
    assert "import compresskit" not in card
    assert not list(place.glob("*.run"))

    assert cli("compress", "teacher", "-m", "svd", "--ratio", "1.5", "-o", "cut").status == 0
    again = cli("finetune", "cut", *asked, "-o", "student", *FAST, "--epochs", "4", "--json")
    assert again.status == 0, again.err
    assert "import compresskit" in Path("student/README.md").read_text()
    assert compresskit.find_sites(tasks.model_for(tasks.find_task("sst2"), "student")) is not None

    scored = cli("evaluate", "student", *asked, "--against", "teacher", "--json")
    assert scored.status == 0, scored.err
    result = scored.json()
    assert (result["task"], result["split"], result["examples"]) == ("sst2", "dev", 12)
    assert result["metrics"] == again.json()["metrics"]
    assert result["against"]["metrics"] == {"accuracy": 1.0}
    assert result["against"]["agreement"]["same_predictions"] == result["metrics"]["accuracy"]
    assert result["parameters"] < result["against"]["parameters"]
    assert result["examples_per_s"] > 0


def test_the_screen_shows_metrics_and_agreement(cli: Cli, place: Path, teacher: Path, kept: list[bool]) -> None:
    shown = cli("evaluate", teacher, "--task", "sst2", "--data", "data", "--against", teacher, "--limit", "5")
    assert shown.status == 0, shown.err
    assert "sst2, dev, 5 examples" in shown.out
    assert "accuracy" in shown.out
    assert "Agreement of the two: same predictions 1.0000." in shown.out
    assert not kept  # nothing is trained


def test_one_s_own_data_is_a_task(cli: Cli, place: Path) -> None:
    rows = [{"review": text, "stars": "five" if label else "one"} for text, label in ROWS]
    for name in ("train", "validation"):
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    for name in ("train", "dev"):
        Path(f"data/{name}.tsv").unlink()
    asked = ("--kind", "classification", "--text-column", "review", "--label-column", "stars", "--data", "data")
    made = cli("finetune", "encoder", *asked, "--metric", "macro_f1", "-o", "out", *FAST, "--epochs", "5", "--json")
    assert made.status == 0, made.err
    assert made.json()["metrics"] == {"macro_f1": 1.0}
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {"0": "five", "1": "one"}
    scored = cli("evaluate", "out", *asked, "--json").json()
    assert scored["metrics"] == {"accuracy": 1.0, "macro_f1": 1.0, "mcc": 1.0}


def test_label_names_say_the_order_of_a_model_that_says_others(cli: Cli, place: Path, teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    shutil.copytree(teacher, "other")
    Path("other/config.json").write_text(json.dumps(config | {"id2label": {0: "NEG", 1: "POS"}}))
    asked = ("--task", "sst2", "--data", "data")
    refused = cli("evaluate", "other", *asked)
    assert refused.status == 1
    assert "the model calls its labels NEG, POS" in refused.err
    straight = cli("evaluate", "other", *asked, "--label-names", "negative,positive", "--json").json()
    assert straight["metrics"] == cli("evaluate", teacher, *asked, "--json").json()["metrics"]
    Path("data/dev.tsv").write_text("sentence\tlabel\ngood\tnegative\nbad\tpositive\n")
    first, second = (
        cli("evaluate", "other", *asked, "--label-names", names, "--json").json()["metrics"]["accuracy"]
        for names in ("negative,positive", "positive,negative")
    )
    assert first + second == 1


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        ((), 2, "say which task: --task NAME"),
        (("--task", "sst2", "--kind", "regression"), 2, "say which task"),
        (("--kind", "regression"), 2, "--kind needs --text-column"),
        (("--task", "sst2", "--metric", "mcc"), 2, "--metric belongs to --kind"),
        (("--kind", "poetry"), 2, "'poetry' is not one of 'classification'"),
        (("--task", "sst2", "--label-names", "a,,b"), 2, "not a list of different names"),
        (("--task", "sst-2", "--data", "data"), 1, "did you mean 'sst2'"),
        (("--task", "sst2"), 1, "nyu-mll/glue:sst2 cannot be loaded from the hub"),
        (("--task", "sst2", "--data", "nowhere"), 1, "there is no file or folder nowhere"),
        (
            ("--task", "sst2", "--data", "data", "--max-length", "9999"),
            1,
            "max_length 9999 is not between 8 and the 64",
        ),
        (("--kind", "classification", "--text-column", "body", "--data", "data"), 1, "no column 'body'; its columns"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_what_cannot_be_is_explained_and_leaves_nothing(
    command: str, arguments: tuple[str, ...], status: int, match: str, place: Path, teacher: Path, fails: Fails
) -> None:
    output = ("-o", "out", "--device", "cpu") if command == "finetune" else ()
    fails(command, teacher, *arguments, *output, match=match, status=status)


def test_training_says_what_would_make_it_faster(cli: Cli, place: Path, teacher: Path, no_kernel: Path) -> None:
    """A compressed model; a dense one has nothing to gain."""
    assert cli("compress", teacher, "-m", "kronecker", "--ratio", "1.5", "-o", "cut").status == 0
    said = {}
    for model in ("cut", str(teacher)):
        asked = ("--task", "sst2", "--data", "data", *FAST, "--max-steps", "1", "-o", f"out-{Path(model).name}")
        outcome = cli("finetune", model, *asked)
        assert outcome.status == 0, outcome.err
        said[model] = "`compresskit kernels --build`, once, may train them faster here" in outcome.err
    assert said == {"cut": native_build.compiler() is not None, str(teacher): False}


def test_a_model_without_a_head_or_with_other_labels_is_refused(place: Path, teacher: Path, fails: Fails) -> None:
    fails("evaluate", "encoder", "--task", "sst2", "--data", "data", match=r"classifier\..*compresskit finetune")
    Path("data/dev.tsv").write_text("premise\thypothesis\tlabel\na\tb\tneutral\n")
    fails("evaluate", teacher, "--task", "mnli", "--data", "data/dev.tsv", match="has 3 labels .*, the model 2")


def test_the_model_and_other_folders_are_never_replaced(place: Path, fails: Fails) -> None:
    asked = ("--task", "sst2", "--data", "data", *FAST)
    fails("finetune", "encoder", *asked, "-o", "encoder", "--force", match="holds the model that is to be trained")
    fails("finetune", "encoder", *asked, "-o", "data", "--force", match="holds something else than a model")
    fails("finetune", "encoder", *asked, "-o", "small", match="exists and is not empty")
    fails("finetune", "encoder", *asked, "-o", "new", "--resume", match="there is no run to resume in .*new.run")


TRAIN = """
import sys, time, transformers
import compresskit.tasks as tasks
from compresskit.core import native_build
from compresskit_cli.app import main
slow = tasks.ProgressCallback.on_step_end
def on_step_end(self, args, state, control, **more):
    slow(self, args, state, control, **more)
    if state.global_step == 12:
        print("waiting", flush=True)
        time.sleep(60)
tasks.ProgressCallback.on_step_end = on_step_end
main()
"""


def test_a_killed_command_resumes_to_the_same_bits(cli: Cli, place: Path) -> None:
    """Terminated as a batch system does it, in a process of its own; then finished by --resume."""
    asked = ["finetune", "encoder", "--task", "sst2", "--data", "data", *FAST, "--epochs", "2", "-o"]
    assert cli(*asked, "whole").status == 0
    root = Path(compresskit.__file__).parents[1]
    before = fingerprint(place / "encoder")
    command = [sys.executable, "-c", TRAIN, *asked, "killed"]
    own = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    environment = own | {"COMPRESSKIT_CACHE": os.environ["COMPRESSKIT_CACHE"]}  # no kernel of the machine's
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert not Path("killed").exists()
    assert Path("killed.run/checkpoint-9").is_dir()
    again = cli(*asked, "killed")
    assert again.status == 1
    assert "--resume goes on with it, --force discards it" in again.err
    assert cli(*asked, "killed", "--resume").status == 0
    assert fingerprint(Path("killed"))["model.safetensors"] == fingerprint(Path("whole"))["model.safetensors"]
    assert not Path("killed.run").exists()
    assert fingerprint(place / "encoder") == before


def test_force_discards_an_interrupted_run_and_replaces_the_output(cli: Cli, place: Path) -> None:
    asked: tuple[Any, ...] = ("finetune", "encoder", "--task", "sst2", "--data", "data", *FAST, "--max-steps", "2")
    Path("out.run").mkdir()
    Path("out.run/run.json").write_text("{}")
    assert cli(*asked, "-o", "out").status == 1
    assert cli(*asked, "-o", "out", "--force").status == 0
    first = fingerprint(Path("out"))["model.safetensors"]
    assert cli(*asked, "-o", "out", "--force", "--seed", "1").status == 0
    assert fingerprint(Path("out"))["model.safetensors"] != first
    assert not Path("out.run").exists()
