"""The folder of a training run: its settings, its log, its checkpoints; and whether it may be resumed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from compresskit.errors import TrainingError

RECORD, LOG = "run.json", "log.jsonl"


def open_run(folder: Path, record: Mapping[str, Any], *, resume: bool) -> str | None:
    """Make a run's folder, or open it again; returns the checkpoint to resume from, None to start.

    Args:
        record: plain data that has to be the same when a run is resumed: task, settings, sizes of data and model.

    Raises:
        TrainingError: there is an interrupted run and it is not to be resumed; or there is none to resume; or it had
            another record.
    """
    said = json.loads(json.dumps(record, default=str))
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            what = "an interrupted run; resume it, or discard it" if interrupted_run(folder) else "something else"
            raise TrainingError(f"{folder} is not empty but holds {what}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(said, indent=1), "utf-8")
        return None
    if not interrupted_run(folder):
        raise TrainingError(f"there is no run to resume in {folder}")
    before = json.loads((folder / RECORD).read_text("utf-8"))
    other = [f"{key}: {before.get(key)} then, {said.get(key)} now" for key in said if before.get(key) != said.get(key)]
    if other:
        raise TrainingError(f"the run in {folder} was another one: {'; '.join(other)}")
    last: str | None = get_last_checkpoint(str(folder))
    return last


def interrupted_run(folder: Path) -> bool:
    """Whether this is the folder of a run that was not completed."""
    return (folder / RECORD).is_file()


def close_run(folder: Path) -> None:
    """Remove the folder of a run that is complete, or is not wanted.

    Raises:
        TrainingError: it is not the folder of a run.
    """
    if not interrupted_run(folder):
        raise TrainingError(f"{folder} is not the folder of a training run (it has no {RECORD}) and is not removed")
    shutil.rmtree(folder)
