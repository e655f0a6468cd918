"""A folder with tiny models, the command line run in this process, and a check that a failure changed nothing."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compresskit
from compresskit_cli import render
from compresskit_cli.app import run
from tests.models import build

FAMILIES = {"bert": "bert", "mlm": "bert-mlm", "gpt2": "gpt2"}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "model")


@dataclass(frozen=True)
class Outcome:
    """What a command left on the screen; captured below Python, so that prints of libraries count too."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The one document on the standard output."""
        return json.loads(self.out)


Cli = Callable[..., Outcome]
Fails = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each command that would have had this process, the tests', keep its freed memory."""
    asked: list[bool] = []
    monkeypatch.setattr(compresskit, "keep_freed_memory", lambda: asked.append(True) is None)
    return asked


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `compresskit ARGUMENTS` in this process, with an output as wide as a pipe."""
    monkeypatch.setattr(render.console, "width", 1000)

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(status, out, err)

    return call


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models with a tokenizer, and `small`: bert compressed by the command."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for name, family in FAMILIES.items():
        build(family).save_pretrained(folder / name)
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / name)
    arguments = ["compress", str(folder / "bert"), "-m", "svd", "--ratio", "3", "-o", str(folder / "small")]
    assert run(arguments) == 0
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: copies of `bert` and of an earlier output, `small`."""
    folder = tmp_path / "work"
    for name in ("bert", "small"):
        shutil.copytree(models / name, folder / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fails(cli: Cli, work: Path) -> Fails:
    """Runs a command that must fail: explained on the standard error alone, with every file and folder as it was."""

    def call(*arguments: object, match: str, status: int = 1) -> Outcome:
        before = fingerprint(work)
        outcome = cli(*arguments)
        assert (outcome.status, outcome.out) == (status, "")
        assert "Error: " in outcome.err
        assert "Traceback" not in outcome.err
        assert re.search(match, outcome.err), outcome.err
        assert fingerprint(work) == before
        return outcome

    return call


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder; hidden ones and empty folders count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def hidden(model: Any) -> torch.Tensor:
    """The last hidden state (2, 9, dim) of the body of a tiny text model."""
    with torch.no_grad():
        output: torch.Tensor = model.base_model(input_ids=torch.arange(4, 22).view(2, 9))[0]
    return output
