"""Examples as token ids, and batches of them.

Every row of the features has `input_ids`, `attention_mask`, perhaps `token_type_ids`, `length` (tokens) and
`example` (the row of the examples it comes from, or begins in), and then, by kind: `labels`; for similarity `side` (0
or 1); for question answering `start_positions`, `end_positions` and `offsets`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, final

import datasets
import torch
from torch import Tensor

from compresskit.errors import DataError, OptionError
from compresskit.tasks.data import Examples
from compresskit.tasks.task import Task

IGNORED = -100
"""The label that losses leave out: padding, special tokens, all but the first piece of a word."""
STRIDE = 128
"""Tokens by which the windows over a long context overlap, as in the original BERT's SQuAD runs."""
Features: TypeAlias = Any
"""A `datasets.Dataset`."""
Batch = dict[str, list[Any]]

CHARS = tuple[int, int]


def tokenized(
    examples: Examples, task: Task, tokenizer: Any, *, max_length: int | None = None, cache: str | Path | None = None
) -> Features:
    """Features of a task's examples, in their order.

    Plain text of language modelling becomes windows that do not overlap, `labels` its tokens without the special ones.
    A pair of texts is cut where it is longest; a context that is too long becomes several overlapping windows. Of a
    sequence of tokens with tags only what fits is kept: `score` counts the words that are cut off as untagged.

    Args:
        max_length: tokens with the special ones; None: the task's, at most the tokenizer's.
        cache: a folder for the memory-mapped result, which is used again when nothing has changed; None: in memory.

    Raises:
        OptionError: max_length is too short or longer than the model's positions.
        DataError: the tokenizer is one in Python that knows no offsets.
    """
    length = checked_length(task, tokenizer, max_length)
    if not tokenizer.is_fast and task.kind in ("token-classification", "question-answering"):
        raise DataError(f"{task.kind} needs a fast tokenizer (tokenizer.json), this is a {type(tokenizer).__name__}")
    if task.kind == "language-modelling":
        return _windows(examples["text"], tokenizer, length)
    make = partial(_MAKERS[task.kind], tokenizer=tokenizer, max_length=length)
    options: dict[str, Any] = {"keep_in_memory": True}
    if cache is not None:
        folder = Path(cache)
        folder.mkdir(parents=True, exist_ok=True)
        key = _fingerprint(examples, task, tokenizer, length)
        options = {"cache_file_name": str(folder / f"{task.name}-{key}.arrow"), "new_fingerprint": key}
    return examples.map(make, with_indices=True, batched=True, remove_columns=examples.column_names, **options)


def _windows(texts: Sequence[str], tokenizer: Any, max_length: int) -> Features:
    """All texts one after the other, an empty line between them, cut at every `max_length` tokens.

    Raises:
        DataError: there are fewer than two tokens.
    """
    before, after = special_ids(tokenizer)
    room = max_length - len(before) - len(after)
    between = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    sources: list[int] = []
    for number, text in enumerate(texts):
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        added = [*(between if number else []), *found]
        ids += added
        sources += [number] * len(added)
    cuts = [slice(start, start + room) for start in range(0, len(ids), room) if len(ids) - start > 1]
    if not cuts:
        raise DataError(f"the text has {len(ids)} token(s): there is nothing to predict")
    rows = [[*before, *ids[cut], *after] for cut in cuts]
    made: Batch = {
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
        "length": [len(row) for row in rows],
        "example": [sources[cut.start] for cut in cuts],
        "labels": [[*[IGNORED] * len(before), *ids[cut], *[IGNORED] * len(after)] for cut in cuts],
    }
    if "token_type_ids" in tokenizer.model_input_names:
        made["token_type_ids"] = [[0] * len(row) for row in rows]
    return datasets.Dataset.from_dict(made)


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def checked_length(task: Task, tokenizer: Any, max_length: int | None) -> int:
    """Tokens of an input at most.

    Raises:
        OptionError: fewer than 8, or more than the model has positions.
    """
    limit = min(tokenizer.model_max_length, 2**20)  # tokenizers without a limit say 10^30
    if max_length is None:
        return int(min(task.max_length, limit))
    if not 8 <= max_length <= limit:
        raise OptionError(f"max_length {max_length} is not between 8 and the {limit} tokens that the model can take")
    return max_length


def _fingerprint(examples: Examples, task: Task, tokenizer: Any, max_length: int) -> str:
    import hashlib

    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    said = [examples._fingerprint, task.kind, type(tokenizer).__name__, vocabulary, max_length, tokenizer.init_kwargs]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _encode(tokenizer: Any, *texts: Any, max_length: int, **more: Any) -> Any:
    return tokenizer(*texts, truncation=True, max_length=max_length, padding=False, **more)


def _with_counts(encoded: Any, examples: list[int]) -> Batch:
    batch = {name: list(encoded[name]) for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")}
    return {**batch, "length": [len(ids) for ids in batch["input_ids"]], "example": examples}


def _text_features(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    texts = [batch[name] for name in ("text", "text_pair") if name in batch]
    encoded = _encode(tokenizer, *texts, max_length=max_length)
    return {**_with_counts(encoded, indices), "labels": batch["label"]}


def _pair_features(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    """Two rows for each pair: its two texts on their own."""
    texts = [text for pair in zip(batch["text"], batch["text_pair"], strict=True) for text in pair]
    encoded = _encode(tokenizer, texts, max_length=max_length)
    return {**_with_counts(encoded, [i for i in indices for _ in (0, 1)]), "side": [0, 1] * len(indices)}


def _tag_features(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    encoded = _encode(tokenizer, batch["tokens"], max_length=max_length, is_split_into_words=True)
    labels = [_piece_labels(encoded.word_ids(i), tags) for i, tags in enumerate(batch["tags"])]
    return {**_with_counts(encoded, indices), "labels": labels}


def _piece_labels(words: list[int | None], tags: list[int]) -> list[int]:
    """The tag of each word at its first piece, IGNORED elsewhere."""
    before = [None, *words[:-1]]
    return [IGNORED if w is None or w == b else tags[w] for w, b in zip(words, before, strict=True)]


def _question_features(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    """A window of the context with the question in front; overlapping windows where the context is long."""
    questions = [text.strip() for text in batch["question"]]
    room = max_length - max(map(len, tokenizer(questions, add_special_tokens=False)["input_ids"]))
    if room < 16:
        raise DataError(f"max_length {max_length} leaves no room for the context beside the longest question")
    encoded = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=min(STRIDE, (room - 4) // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources = encoded["overflow_to_sample_mapping"]
    windows = [
        [chars if part == 1 else (-1, -1) for chars, part in zip(offsets, encoded.sequence_ids(i), strict=True)]
        for i, offsets in enumerate(encoded["offset_mapping"])
    ]
    spans = [
        _answer_tokens(window, _answer_chars(batch, source)) for window, source in zip(windows, sources, strict=True)
    ]
    return {
        **_with_counts(encoded, [indices[source] for source in sources]),
        "start_positions": [start for start, _ in spans],
        "end_positions": [end for _, end in spans],
        "offsets": windows,
    }


def _answer_chars(batch: Batch, source: int) -> CHARS | None:
    """First and last + 1 character of the first answer."""
    if not batch["answer_texts"][source]:
        return None
    start = batch["answer_starts"][source][0]
    return start, start + len(batch["answer_texts"][source][0])


def _answer_tokens(window: list[CHARS], answer: CHARS | None) -> tuple[int, int]:
    """First and last token of the answer, (0, 0) for the classifier token where the window does not hold all of it."""
    inside = [i for i, (start, _) in enumerate(window) if start >= 0]
    if answer is None or not inside or window[inside[0]][0] > answer[0] or window[inside[-1]][1] < answer[1]:
        return 0, 0
    starts = [i for i in inside if window[i][0] <= answer[0]]
    ends = [i for i in inside if window[i][1] >= answer[1]]
    return starts[-1], ends[0]


_MAKERS: dict[str, Callable[..., Batch]] = {
    "classification": _text_features,
    "regression": _text_features,
    "similarity": _pair_features,
    "token-classification": _tag_features,
    "question-answering": _question_features,
}


@final
@dataclass(frozen=True)
class Collator:
    """Rows of features -> one batch of tensors (batch, time), padded on the right to its longest row.

    Columns that no model takes are left out, so that `Trainer` need not remove them.

    Args:
        multiple_of: pad to a multiple of this many tokens (8 suits tensor cores).
    """

    tokenizer: Any
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.multiple_of) * self.multiple_of
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        fill["token_type_ids"] = self.tokenizer.pad_token_type_id
        batch = {
            name: torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in rows])
            for name, value in fill.items()
            if name in rows[0]
        }
        for name in ("start_positions", "end_positions"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        if "labels" in rows[0]:
            batch["labels"] = _label_tensor([row["labels"] for row in rows], width)
        return batch


def _label_tensor(labels: list[Any], width: int) -> Tensor:
    if isinstance(labels[0], list):
        return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels])
    return torch.tensor(labels)


def collator(tokenizer: Any, *, multiple_of: int = 1) -> Collator:
    """What makes batches of features for this tokenizer.

    Raises:
        DataError: the tokenizer has no padding token (`tokenizer_for` sees to it).
    """
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token; open it with tokenizer_for, which chooses one")
    return Collator(tokenizer, multiple_of)
