"""Plain text files as documents.

A file with blank lines holds one document between each two of them (hard-wrapped lines are joined), any other file one
document a line.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from compresskit.errors import DataError

MAX_CHARS = 1_000_000
"""A longer document is read as several."""


def text_files(path: Path) -> list[Path]:
    """The `*.txt` below a folder, in order, or the file itself.

    Raises:
        DataError: there are none.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise DataError(f"there is no *.txt in {path}; plain text is read from such files, at any depth")
    return files


def documents(files: Iterable[Path]) -> Iterator[str]:
    """The documents of text files, one after the other; a file is never in memory as a whole.

    Raises:
        DataError: not UTF-8, with the line.
    """
    for path in files:
        blocks = any(not line for line in _lines(path))
        lines: list[str] = []
        size = 0
        for line in itertools.chain(_lines(path), [""]):
            if lines and (not blocks or not line or size > MAX_CHARS):
                yield " ".join(lines)
                lines, size = [], 0
            if line:
                lines.append(line)
                size += len(line)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
