"""From what a user has, text or batches, to batches that a model can be called with."""

import copy
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import CalibrationError, DataError
from compresskit.texts import documents, text_files

Batch = Mapping[str, Tensor]
"""Arguments of a model's `forward` by name."""
Data = str | Path | Iterable[Any]
"""A text file or a folder of such, a list of texts, a `datasets.Dataset`, or an iterable of batches (a DataLoader)."""

MIN_WORDS = 5
"""Shorter lines of text files (headings, numbers) are no samples."""
TEXT_COLUMNS = ("text", "sentence", "sentence1")
IGNORED = -100
"""Fills labels, as everywhere in transformers; all else is filled with 0 beside an attention mask of 0."""


def read_batches(
    data: Data, tokenizer: Any = None, *, samples: int = 128, max_length: int = 128, batch_size: int = 8, seed: int = 0
) -> Iterator[Batch]:
    """Batches of up to `samples` examples in all.

    Args:
        data: a file or a folder with `*.txt` at any depth (a random sample of their documents), a list of texts or a
            `datasets.Dataset` with a column of texts or of `input_ids` (a random sample of the rows), or an iterable of
            batches (its first ones, as they are).
        tokenizer: for texts; a call with them returns `input_ids` and `attention_mask`.
        max_length: tokens of a text; the rest is cut off.
        batch_size: examples in a batch, for data that is no batches yet.
        seed: of the sample.

    Raises:
        DataError: there is no text, it is not UTF-8, a dataset has no column of texts or ids, something is no batch.
        CalibrationError: there are texts but no tokenizer, or a number is below 1.
    """
    for name, value in (("samples", samples), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise CalibrationError(f"{name} is a count, at least 1; got {value}")
    chance = random.Random(seed)  # noqa: S311 - a sample, no secret
    if isinstance(data, str | Path):
        texts = _sample((text for text in _documents(data) if len(text.split()) >= MIN_WORDS), samples, chance)
        if not texts:
            raise DataError(f"{data} holds no text of at least {MIN_WORDS} words")
        return _encoded(texts, tokenizer, max_length, batch_size)
    if hasattr(data, "column_names"):
        return _rows(data, tokenizer, samples, max_length, batch_size, chance)
    if isinstance(data, Sequence) and data and all(isinstance(text, str) for text in data):
        return _encoded(_sample(data, samples, chance), tokenizer, max_length, batch_size)
    return _first(data, samples)


def _documents(data: str | Path) -> Iterator[str]:
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(f"there is no file or folder {data}; texts themselves are given as a list")
    return documents(text_files(path))


def _sample(texts: Iterable[str], size: int, chance: random.Random) -> list[str]:
    """Texts chosen at random, each as likely (reservoir sampling), in their order."""
    kept: list[tuple[int, str]] = []
    for number, text in enumerate(texts):
        if len(kept) < size:
            kept.append((number, text))
        elif (place := chance.randrange(number + 1)) < size:
            kept[place] = (number, text)
    return [text for _, text in sorted(kept)]


def _encoded(texts: Sequence[str], tokenizer: Any, max_length: int, batch_size: int) -> Iterator[Batch]:
    if tokenizer is None:
        raise CalibrationError("texts need tokenizer=, the model's own; or give batches that are tokenised already")
    tokenize = _with_padding_token(tokenizer)
    ordered = sorted(texts, key=len)  # alike in length, little padding
    for start in range(0, len(ordered), batch_size):
        batch = tokenize(
            ordered[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        yield dict(batch)


def _with_padding_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that pads with the end of text (GPT-2 has no token for it; the mask hides it)."""
    if getattr(tokenizer, "pad_token", "") is not None:
        return tokenizer
    ours = copy.deepcopy(tokenizer)
    ours.pad_token = tokenizer.eos_token
    return ours


def _rows(
    dataset: Any, tokenizer: Any, samples: int, max_length: int, batch_size: int, chance: random.Random
) -> Iterator[Batch]:
    """Batches of a `datasets.Dataset`."""
    columns = list(dataset.column_names)
    rows = [dataset[i] for i in sorted(chance.sample(range(len(dataset)), min(samples, len(dataset))))]
    if "input_ids" in columns:
        return (_padded(rows[start : start + batch_size], max_length) for start in range(0, len(rows), batch_size))
    texts = [name for name in columns if rows and isinstance(rows[0][name], str)]
    wanted = next((name for name in TEXT_COLUMNS if name in texts), texts[0] if len(texts) == 1 else None)
    if wanted is None:
        raise DataError(
            f"the dataset has no column 'input_ids' and not one column of texts; it has: {', '.join(columns)}"
        )
    return _encoded([row[wanted] for row in rows], tokenizer, max_length, batch_size)


def _padded(rows: Sequence[Mapping[str, Any]], max_length: int) -> Batch:
    """Rows of ids as one batch; what is neither a number nor a list of numbers is left out."""
    length = min(max(len(row["input_ids"]) for row in rows), max_length)
    first = {"attention_mask": [1] * len(rows[0]["input_ids"]), **rows[0]}
    batch: dict[str, Tensor] = {}
    for name in first:
        values = [row.get(name, [1] * len(row["input_ids"])) for row in rows]
        if all(isinstance(value, int | float) for value in values):
            batch[name] = torch.tensor(values)
        elif all(isinstance(value, list) and all(isinstance(v, int) for v in value) for value in values):
            fill = IGNORED if name == "labels" else 0
            batch[name] = torch.tensor([[*v[:length], *[fill] * (length - len(v))] for v in values])
    return batch


def _first(batches: Iterable[Any], samples: int) -> Iterator[Batch]:
    """The first batches, until they hold `samples` examples."""
    if not isinstance(batches, Iterable):
        raise DataError(
            f"calibration takes a text file or folder, texts, a dataset or batches; got {type(batches).__name__}"
        )
    seen = 0
    for number, batch in enumerate(batches):
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
        if not tensors:
            raise DataError(
                f"batch {number} is a {type(batch).__name__}, not a mapping of argument names to tensors, as "
                "{'input_ids': ..., 'attention_mask': ...}"
            )
        yield tensors
        seen += len(next(iter(tensors.values())))
        if seen >= samples:
            return


def arguments(model: torch.nn.Module, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What of a batch the model takes, on its device; an encoder-decoder gets its own input to decode.

    Raises:
        CalibrationError: the model takes none of it.
    """
    parameters = inspect.signature(model.forward).parameters
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kept = {k: v.to(device) for k, v in batch.items() if k in named or not named}
    if not kept:
        raise CalibrationError(
            f"{type(model).__name__} takes none of {', '.join(batch)}; its arguments: {', '.join(sorted(named))}"
        )
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes and "input_ids" in kept and not {"labels", "decoder_input_ids", "decoder_inputs_embeds"} & kept.keys():
        kept |= _decoder_inputs(model, kept)
    return kept


def _decoder_inputs(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's ids one place to the right, behind the token that decoding starts with."""
    ids = batch["input_ids"]
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    start = start if start is not None else (getattr(config, "pad_token_id", None) or 0)
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    mask = batch.get("attention_mask")
    return {"decoder_input_ids": shifted, **({} if mask is None else {"decoder_attention_mask": mask})}
