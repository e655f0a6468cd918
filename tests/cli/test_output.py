"""Outputs that cannot be written, and runs that are interrupted: nothing half done is left, nothing is lost."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import compresskit
from compresskit_cli import render
from tests.cli.conftest import Cli, Fails, fingerprint

START = ("compress", "bert", "-m", "svd", "--ratio", "2")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(compresskit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("small", "small exists and is not empty; choose another folder or force its replacement"),
        ("bert/config.json", "bert/config.json is a file; give the name of a folder"),
        ("bert/config.json/out", "bert/config.json/out cannot be made: .*/bert/config.json is a file"),
        ("/proc/out", "/proc/out could not be written: .*What was there before is untouched"),
        ("bert", "bert exists and is not empty"),
    ],
)
def test_an_output_that_cannot_be_made(output: str, match: str, fails: Fails) -> None:
    fails(*START, "-o", output, match=match)


def test_the_output_is_checked_before_the_model_is_read(work: Path, fails: Fails) -> None:
    (work / "bert" / "config.json").unlink()
    fails(*START, "-o", "small", match="small exists and is not empty")


def test_force_replaces_neither_files_nor_other_folders(work: Path, fails: Fails) -> None:
    (work / "notes").mkdir()
    (work / "notes" / "text.txt").write_text("mine")
    fails(*START, "--force", "-o", "notes", match="notes holds something else than a model .* is not replaced")
    fails(*START, "--force", "-o", "notes/text.txt", match="text.txt is a file; give the name of a folder")


def test_force_does_not_replace_the_model_that_is_read(work: Path, fails: Fails) -> None:
    fails(*START, "--force", "-o", "bert", match="bert holds the model that is to be compressed; choose another folder")
    shutil.copytree(work / "bert", work / "small" / "inner")
    inner = ["compress", "small/inner", "-m", "svd", "--ratio", "2", "--force", "-o", "small/../small"]
    fails(*inner, match="small/../small holds the model that is to be compressed")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # the weights take some 100 kB


def test_a_file_that_cannot_grow(work: Path) -> None:
    before = fingerprint(work)
    command = [sys.executable, "-B", "-m", "compresskit_cli", *START, "-o", "small", "--force"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit_files, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "could not be written: " in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert fingerprint(work) == before


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system in memory; the test is skipped where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("kilobytes", "match"),
    [(64, "no space left for .*: the model takes 0 MB, 0 MB are free"), (112, "could not be written: .*No space left")],
)
def test_no_space_left(kilobytes: int, match: str, fails: Fails, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        fails(*START, "-o", disk / "out", match=match)
        assert list(disk.iterdir()) == []


def interrupt(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def assert_interrupted(cli: Cli, work: Path, *arguments: str) -> None:
    before = fingerprint(work)
    outcome = cli(*START, *arguments)
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.strip() == "Interrupted: no half-written output is left."
    assert fingerprint(work) == before


@pytest.mark.parametrize("stage", ["analyse", "fit"])
@pytest.mark.parametrize("more", [("-o", "small", "--force"), ("-o", "new/out"), ("--json",)])
def test_ctrl_c_while_it_works(
    stage: str, more: tuple[str, ...], cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    @contextmanager
    def progress() -> Iterator[Any]:
        def show(step: Any) -> None:
            seen.append((step.stage, step.done))
            if seen[-1] == (stage, 3):
                interrupt()

        yield show

    monkeypatch.setattr(render, "progress_bar", progress)
    assert_interrupted(cli, work, *more)
    assert seen[-1] == (stage, 3)


@pytest.mark.parametrize("more", [("-o", "small", "--force"), ("-o", "new/deep/out")])
def test_ctrl_c_while_it_writes(more: tuple[str, ...], cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = PreTrainedModel.save_pretrained
    written = []

    def save_and_interrupt(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        save(model, folder, **options)
        written.extend(path.name for path in Path(folder).iterdir())
        interrupt()

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_and_interrupt)
    assert_interrupted(cli, work, *more)
    assert "model.safetensors" in written


@pytest.mark.parametrize("moment", [1, 2])
def test_ctrl_c_while_it_replaces(moment: int, cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = Path.rename, []

    def rename_and_interrupt(path: Path, target: Path) -> Path:
        calls.append(path.name)
        if len(calls) == moment:
            interrupt()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_and_interrupt)
    assert_interrupted(cli, work, "-o", "small", "--force")
    assert calls[0] == "small"


def test_ctrl_c_while_a_plan_is_written(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "plan.json").write_text("the earlier one")
    before = fingerprint(work)
    monkeypatch.setattr(Path, "replace", interrupt)
    outcome = cli("plan", *START[1:], "-o", "plan.json", "--force")
    assert outcome.status == 130
    assert fingerprint(work) == before


SLOW = """
import time
import compresskit.hub.save as save
from compresskit_cli.app import main

def wait(*arguments):
    print("writing", flush=True)
    time.sleep(60)

save._copy_companions = wait
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_stopped_while_it_writes(number: int, status: int, work: Path) -> None:
    before = fingerprint(work)
    command = [sys.executable, "-c", SLOW, *START, "-o", "small", "--force"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        staged = [path for path in work.iterdir() if path.name.startswith(".small.")]
        assert [(path / "model.safetensors").is_file() for path in staged] == [True]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert "Traceback" not in err
    assert fingerprint(work) == before
