"""A tiny encoder with a tokenizer that knows a few words, and small files of every task."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import transformers

import compresskit.tasks as tasks

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", "very", "not", "is", "was"),
    *(
        "we",
        "saw",
        "in",
        "who",
        "where",
        "john",
        "mary",
        "paris",
        "rome",
        "lives",
        "##s",
        "##ed",
        "walk",
        ".",
        "?",
        "!",
    ),
)
Write = Callable[..., pathlib.Path]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tiny_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes, **changes)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a tiny BertModel without a head."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.BertModel(tiny_config()).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=64).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(encoder: pathlib.Path) -> Any:
    return tasks.tokenizer_for(encoder)


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    """Writes a text, or one JSON object a line, to a file of this name."""

    def make(name: str, content: Any, *, encoding: str = "utf-8") -> pathlib.Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content)
        path.write_bytes(text.encode(encoding))
        return path

    return make


@pytest.fixture
def reviews(write: Write, tmp_path: pathlib.Path) -> pathlib.Path:
    """SST-2 of a dozen words: `good` is positive, `bad` negative."""
    frames = ("{} film", "a very {} film", "we saw a {} film", "the film is {}", "the film was very {} .", "is {} !")
    rows = [f"{frame.format(word)}\t{label}" for frame in frames for word, label in (("good", 1), ("bad", 0))]
    for split, times in (("train", 6), ("dev", 1)):
        write(f"SST-2/{split}.tsv", "\n".join(["sentence\tlabel", *rows * times]) + "\n")
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder with real GLUE data; no part of this project."""
    folder = os.environ.get("COMPRESSKIT_DATA")
    if not folder:
        pytest.skip("COMPRESSKIT_DATA is not set: it names a folder with glue/ in GLUE's tab-separated layout")
    return pathlib.Path(folder)
