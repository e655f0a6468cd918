"""From what a user gave, a folder, a file or a hub id, to the files of one split."""

import re
from pathlib import Path
from typing import Any

from compresskit.errors import DataError
from compresskit.tasks.task import HubSource, Task

TABLES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Files with columns."""
FORMATS = (*TABLES, ".conll", ".txt")
"""Files that are read; `.conll` for token classification alone, `.txt` for that and for plain text."""
COLLECTIONS = ("", "glue")
"""Folders in which that of a task is looked for, below the one that was given."""
SHARD = re.compile(r"-\d+-of-\d+$")


def find_files(task: Task, data: str | Path, split: str) -> list[Path]:
    """The files of a split of a task, more than one if they are shards.

    `data` is a file (the split that is asked for, whatever its name), the folder with the splits, or a folder that
    holds that folder, as GLUE does.

    Raises:
        DataError: no such file or split, or several files that could be it.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}")
    folders = _folders(task, path)
    stems = task.splits.get(split, (split,))
    for folder in folders:
        found = _match(task, folder, stems)
        if len({SHARD.sub("", file.stem) + file.suffix for file in found}) > 1:
            raise DataError(
                f"{folder} has several files that could be the split {split!r} of {task.name}: "
                f"{', '.join(file.name for file in found)}; name one of them as the data"
            )
        if found:
            return found
    seen = sorted({file.name for folder in folders for file in folder.iterdir() if file.suffix in FORMATS})
    names = " or ".join(f"{stem}.*" for stem in stems)
    raise DataError(
        f"there is no split {split!r} of {task.name} in {', '.join(map(str, folders))}: looked for {names} "
        f"({', '.join(FORMATS)}), found {', '.join(seen[:8]) or 'none of these'}"
    )


def _folders(task: Task, path: Path) -> list[Path]:
    """The folder itself, and those below it that are called like the task."""
    wanted = {_plain(name) for name in task.folders}
    parents = [path / collection for collection in COLLECTIONS if (path / collection).is_dir()]
    children = [child for parent in parents for child in sorted(parent.iterdir()) if child.is_dir()]
    return [path, *(child for child in children if _plain(child.name) in wanted)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _match(task: Task, folder: Path, stems: tuple[str, ...]) -> list[Path]:
    plain = task.kind != "token-classification"
    foreign = {"token-classification": (), "language-modelling": (".conll",)}.get(task.kind, (".txt", ".conll"))
    formats = [suffix for suffix in FORMATS if suffix not in foreign]
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for stem in stems:
        found = [f for f in files if f.suffix in formats and SHARD.sub("", f.stem) == stem]
        if not plain:  # the files of CoNLL-2003 have no suffix that says so: eng.testa
            found += [f for f in files if f.name == stem]
        if found:
            return found
    return []


def hub_source(task: Task, data: str | Path | None) -> HubSource | None:
    """Where on the hub the data is, None if it is in files: `owner/name`, `owner/name:config` or the task's own.

    Raises:
        DataError: the task has no data of its own, or `data` is neither there nor a hub id.
    """
    if data is None:
        if task.hub is None:
            raise DataError(f"the task {task.name} has no data of its own; name a file, a folder or a hub id")
        return task.hub
    if Path(data).expanduser().exists():
        return None
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", str(data))
    if match is None or str(data).startswith("."):
        raise DataError(f"there is no file or folder {data}, and a hub id is written owner/name or owner/name:config")
    return HubSource(match[1], match[2])


def load_hub(source: HubSource, task: Task, split: str) -> Any:
    """A split of a hub dataset as a `datasets.Dataset`, cached where `datasets` caches.

    Raises:
        DataError: it cannot be reached or has no such split.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    label = source.id if source.config is None else f"{source.id}:{source.config}"
    try:
        splits = datasets.get_dataset_split_names(source.id, source.config, revision=source.revision)
        name = next((stem for stem in (*task.splits.get(split, ()), split) if stem in splits), None)
        if name is None:
            raise DataError(f"the dataset {label} has no split {split!r}; it has: {', '.join(splits)}")
        return datasets.load_dataset(source.id, source.config, split=name, revision=source.revision)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the dataset {label} cannot be loaded from the hub: {said}. Without a connection (or with HF_HUB_OFFLINE "
            "set), give a folder or file with the data"
        ) from error
