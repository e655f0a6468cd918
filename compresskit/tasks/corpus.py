"""Plain text as token ids, for distillation without labels.

A file with blank lines holds one document between each two of them (hard-wrapped lines are joined), any other file
one document a line. A document is cut at the ends of its sentences into pieces that fill `max_length` as well as
whole sentences can; a longer sentence is cut within. Pieces lie in a memory-mapped file, so a corpus may be larger
than memory.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets

from compresskit.errors import DataError, OptionError
from compresskit.tasks.features import Features, special_ids
from compresskit.tasks.find import hub_source, load_hub
from compresskit.tasks.task import HubSource, find_task
from compresskit.texts import documents, text_files

Unit = Literal["document", "sentence"]
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
"""Good enough to cut at: an abbreviation cuts too early, which costs a shorter piece."""
BATCH = 64
"""Documents that are tokenised together."""


def load_corpus(
    data: str | Path,
    tokenizer: Any,
    *,
    cache: str | Path,
    max_length: int = 128,
    unit: Unit = "document",
    min_tokens: int = 8,
    split: str = "train",
) -> Features:
    """Pieces of text as rows of `input_ids`, `attention_mask`, `length` and `document`, for `Collator`.

    Args:
        data: a file or a folder with `*.txt` at any depth, or a hub id (`owner/name:config`) with a column `text`.
        cache: folder for the memory-mapped result; used again if files, tokenizer and options are the same.
        max_length: tokens of a piece with the special ones.
        unit: `document`: as many sentences as fit; `sentence`: one each.
        min_tokens: shorter pieces (headings, page numbers) are left out; special tokens count.
        split: of a hub dataset.

    Raises:
        DataError: no text there, not UTF-8, or every piece is too short; names the file and line.
        OptionError: max_length is shorter than min_tokens or longer than the model's positions, or the tokenizer
            is one in Python, without offsets.
    """
    limit = min(tokenizer.model_max_length, 2**20)
    if not max(8, min_tokens) <= max_length <= limit:
        raise OptionError(f"max_length {max_length} is not between {max(8, min_tokens)} and {limit} tokens")
    if not tokenizer.is_fast:
        raise OptionError(f"plain text needs a fast tokenizer (tokenizer.json), not a {type(tokenizer).__name__}")
    source = hub_source(find_task("text"), data)
    files = [] if source is not None else text_files(Path(data).expanduser())
    options = {"max_length": max_length, "unit": unit, "min_tokens": min_tokens}
    origin: Any = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files] or [source, split]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    key = hashlib.sha256(repr([origin, options, vocabulary, tokenizer.init_kwargs]).encode()).hexdigest()[:16]

    def pieces() -> Iterator[dict[str, Any]]:
        texts = documents(files) if source is None else _hub_documents(source, split)
        empty = True
        for piece in _pieces(texts, tokenizer, max_length=max_length, unit=unit, min_tokens=min_tokens):
            empty = False
            yield piece
        if empty:
            raise DataError(f"{data} holds no text of at least {min_tokens} tokens")

    ids = datasets.List(datasets.Value("int32"))
    columns = {"input_ids": ids, "attention_mask": datasets.List(datasets.Value("int8"))}
    counts = {name: datasets.Value("int32") for name in ("length", "document")}
    features = datasets.Features({**columns, **counts})
    try:
        return datasets.Dataset.from_generator(pieces, features=features, cache_dir=str(cache), fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):  # what the generator itself has raised
            raise error.__cause__ from error
        raise


def _hub_documents(source: HubSource, split: str) -> Iterator[str]:
    dataset = load_hub(source, find_task("text"), split)
    if "text" not in dataset.column_names:
        raise DataError(f"{source.id} has no column 'text'; it has: {', '.join(dataset.column_names)}")
    for row in dataset:
        if row["text"].strip():
            yield row["text"].strip()


def _pieces(
    texts: Iterable[str], tokenizer: Any, *, max_length: int, unit: Unit, min_tokens: int
) -> Iterator[dict[str, Any]]:
    before, after = special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    numbered = enumerate(texts)
    while batch := list(itertools.islice(numbered, BATCH)):
        encoded = tokenizer(
            [text for _, text in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for (number, text), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            for start, end in cut(_sentence_ends(text, offsets), room, whole=unit == "document"):
                piece = [*before, *ids[start:end], *after]
                if len(piece) >= min_tokens:
                    length = len(piece)
                    yield {"input_ids": piece, "attention_mask": [1] * length, "length": length, "document": number}


def _sentence_ends(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Number of tokens before the end of each sentence."""
    starts = [start for start, _ in offsets]
    ends = [bisect.bisect_left(starts, match.end()) for match in SENTENCE_END.finditer(text)]
    return sorted({*ends, len(starts)} - {0})


def cut(ends: list[int], room: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """First token and last + 1 of each piece of at most `room` tokens.

    Args:
        ends: of the sentences, rising; the last is the number of tokens.
        whole: put as many sentences as fit into a piece; false: one each.
    """
    start = last = 0
    for end in ends:
        if last > start and (not whole or end - start > room):
            yield start, last
            start = last
        while end - start > room:
            yield start, start + room
            start += room
        last = end
    if last > start:
        yield start, last
