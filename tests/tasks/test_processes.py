"""Alone or one of several: what the environment of a process says. How several train: tests/cli/test_processes.py."""

import pytest
import torch

from compresskit.errors import TrainingError
from compresskit.tasks import Processes, is_first
from compresskit.tasks.processes import NEEDED

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", *NEEDED):
        monkeypatch.delenv(name, raising=False)


def test_alone_everything_is_done_here() -> None:
    processes, done = Processes(CPU), []
    assert processes.alone
    assert processes.first
    assert processes.once(lambda: 3) == 3
    with processes.first_then_others():
        done.append(1)
    processes.wait()
    processes.leave()
    assert done == [1]


def test_a_rank_without_others_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # of a batch system, not of a training
    assert is_first()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not is_first()


def test_several_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        TrainingError, match="WORLD_SIZE is 2, but LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set"
    ):
        Processes(CPU)
