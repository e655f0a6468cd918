"""Reading files row by row, so that every complaint names the file and the line."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from compresskit.errors import DataError


@final
@dataclass(frozen=True)
class Row:
    """One example as it was found.

    Args:
        source: file or hub id.
        unit: what is counted there: line, row, question.
        number: counted from 1, headers included.
    """

    source: str
    unit: str
    number: int | str
    values: dict[str, Any]

    def error(self, reason: str) -> DataError:
        """A DataError that says where."""
        return DataError(f"{self.source}, {self.unit} {self.number}: {reason}")


def read_rows(path: Path, *, expected: Iterable[Sequence[str]], headerless: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file, as its suffix says how.

    Args:
        expected: for each column that is needed, its possible names: a first line that has them all is a header.
        headerless: names of the columns where the first line is no header.

    Raises:
        DataError: the file is empty, malformed or not UTF-8, with its line.
    """
    if path.suffix in (".tsv", ".csv"):
        split = _split_tabs if path.suffix == ".tsv" else _split_commas
        rows = _delimited(path, split, [set(names) for names in expected], list(headerless))
    else:
        rows = _READERS.get(path.suffix, _read_conll)(path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} has no rows")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; a byte-order mark is dropped."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
            yield number, text.rstrip("\r\n")


def _split_tabs(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated without quoting: a quotation mark is a character like any other."""
    for number, line in _lines(path):
        yield number, line.split("\t") if line else []


def _split_commas(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Comma-separated with the usual quoting; the number is that of the line where the row ends."""
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
        yield reader.line_num, fields


def _delimited(
    path: Path,
    split: Callable[[Path], Iterator[tuple[int, list[str]]]],
    expected: list[set[str]],
    headerless: list[str],
) -> Iterator[Row]:
    header: list[str] | None = None
    blank: int | None = None
    for number, fields in split(path):
        if header is None:
            is_header = not headerless or all(names & set(fields) for names in expected)
            header = fields if is_header else headerless
            if len(set(header)) != len(header):
                raise DataError(f"{path}, line {number}: two columns have the same name: {', '.join(header)}")
            if is_header:
                continue
        if not fields:
            blank = blank or number  # allowed at the end only
            continue
        if blank is not None:
            raise DataError(f"{path}, line {blank}: the line is empty")
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(fields)} fields where {len(header)} columns are expected "
                f"({', '.join(header)})"
            )
        yield Row(str(path), "line", number, dict(zip(header, fields, strict=True)))


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number}: a JSON object is expected, found {type(values).__name__}")
        yield Row(str(path), "line", number, values)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or a file of SQuAD."""
    text = "\n".join(line for _, line in _lines(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); a file with one object a line is called .jsonl"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        yield from _squad_rows(path, content["data"])
        return
    if not isinstance(content, list):
        raise DataError(f"{path} is neither a list of objects nor a SQuAD file (an object with a list 'data')")
    for number, values in enumerate(content, 1):
        if not isinstance(values, dict):
            raise DataError(f"{path}, row {number}: a JSON object is expected, found {type(values).__name__}")
        yield Row(str(path), "row", number, values)


def _squad_rows(path: Path, articles: list[Any]) -> Iterator[Row]:
    number = 0
    for article in articles:
        for paragraph in article.get("paragraphs", ()):
            for question in paragraph.get("qas", ()):
                number += 1
                found = question.get("answers", ())
                yield Row(
                    str(path),
                    "question",
                    question.get("id", number),
                    {
                        "id": question.get("id"),
                        "question": question.get("question"),
                        "context": paragraph.get("context"),
                        "answers": {
                            "text": [answer.get("text") for answer in found],
                            "answer_start": [answer.get("answer_start") for answer in found],
                        },
                    },
                )


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(str(path), "row", number, values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _read_conll(path: Path) -> Iterator[Row]:
    """One token a line, columns between blanks, its tag last; blank lines between sentences; -DOCSTART- is none."""
    tokens: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in (*_lines(path), (0, "")):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            if len(fields) < 2:
                raise DataError(f"{path}, line {number}: a token and its tag are expected, found {line!r}")
            start = start if tokens else number
            tokens.append(fields[0])
            tags.append(fields[-1])
        elif tokens:
            yield Row(str(path), "line", start, {"tokens": tokens, "ner_tags": tags})
            tokens, tags = [], []


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
