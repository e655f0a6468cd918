"""Training commands under `torchrun`: two processes make what one makes, once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Cli
from tests.cli.test_distill import place  # noqa: F401 - a fixture
from tests.recipes.conftest import base, reviews, teacher, text  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent.parent


def launched(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """The command in two processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [sys.executable, *launcher, "-m", "compresskit_cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


def both(cli: Cli, place: Path, *arguments: object, sizes: tuple[str, ...]) -> list[dict[str, Any]]:  # noqa: F811
    """What one process says with batches of eight, and two with batches of four; with the weights that they made."""
    found = []
    for name, batch in (("one", "8"), ("two", "4")):
        asked = [*arguments, "--device", "cpu", "-o", name, "--json"]
        asked += [item for option in sizes for item in (option, batch)]
        if name == "one":
            found.append(cli(*asked).json())
        else:
            done = launched(place, *asked)
            assert done.returncode == 0, done.stderr[-3000:]
            found.append(json.loads(done.stdout))  # one of them speaks
        assert not (place / f"{name}.run").exists()
        found[-1]["weights"] = load_file(place / name / "model.safetensors")
    return found


def assert_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert (tensor - two["weights"][name]).abs().max() <= 1e-4, name
    assert one["metrics"] == pytest.approx(two["metrics"], abs=0.1)


def test_distill(cli: Cli, place: Path) -> None:  # noqa: F811
    asked = ("distill", "--preset", "kroneckerbert:k8", "--teacher", "teacher", "--base", "base")
    asked += ("--task", "sst2", "--data", "data", "--corpus", "text", "--max-steps", "3", "--stage1-steps", "3")
    settings = ("corpus.max_length=32", "corpus.dropout=0", "task.dropout=0", "corpus.mlm=false", "corpus.nsp=false")
    asked += tuple(item for setting in settings for item in ("--set", setting))
    one, two = both(cli, place, *asked, sizes=("--batch-size", "--stage1-batch-size"))
    assert_alike(one, two)
    assert [stage["steps"] for stage in two["stages"]] == [3, 3]
    assert two["before"] == pytest.approx(one["before"])
    log = [json.loads(line) for line in (place / "two" / "distillation.jsonl").read_text("utf-8").splitlines()]
    steps = [(line["stage"], line["step"]) for line in log if "loss" in line]
    assert len(steps) == len(set(steps))


def test_finetune(cli: Cli, place: Path) -> None:  # noqa: F811
    asked = ("finetune", "base", "--task", "sst2", "--data", "data", "--max-steps", "3")
    one, two = both(cli, place, *asked, "--dropout", "0", sizes=("--batch-size",))
    assert_alike(one, two)
    assert two["steps"] == 3


def test_an_error_ends_all_of_them_and_leaves_nothing(place: Path) -> None:  # noqa: F811
    (place / "data" / "train.tsv").write_text("sentence\tlabel\n", "utf-8")
    asked = ("distill", "--preset", "kroneckerbert:k8", "--teacher", "teacher", "--task", "sst2", "--data", "data")
    done = launched(place, *asked, "--device", "cpu", "-o", "out")
    assert done.returncode == 1
    assert "train.tsv" in done.stderr
    assert not list(place.glob("out*"))
