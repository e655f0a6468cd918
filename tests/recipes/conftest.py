"""A tiny pre-trained BERT with both heads, a teacher of SST-2 and one without a head, a corpus and a task."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import compresskit.tasks as tasks

WORDS = (
    *("good", "bad", "film", "a", "the", "very", "not", "is", "was", "we", "saw", "in", "who", "where"),
    *("john", "mary", "paris", "rome", "lives", "walk"),
)
VOCAB = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "?", "!")
FRAMES = ("{} film", "a very {} film", "we saw a {} film", "the film is {}", "the film was very {} .", "is {} !")
ROWS = [(frame.format(word), label) for frame in FRAMES for word, label in (("good", 1), ("bad", 0))]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokenizer() -> Any:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)}, model_max_length=64)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(**changes: Any) -> Any:
    sizes = {"vocab_size": len(VOCAB), "max_position_embeddings": 64, "initializer_range": 0.2, **SIZES}
    return transformers.BertConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with the heads of its pre-training."""
    torch.manual_seed(0)
    return save(transformers.BertForPreTraining(config()), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without any head."""
    torch.manual_seed(0)
    return save(transformers.BertModel(config()), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head for SST-2, which has learned nothing."""
    torch.manual_seed(1)
    model = tasks.model_for(tasks.find_task("sst2"), base, new_head=True)
    return save(model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SST-2 and STS of a dozen rows."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev"):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in ROWS * (2 if split == "train" else 1))]
        pairs = [f"{ROWS[i][0]}\t{ROWS[-i][0]}\t{i % 5}" for i in range(len(ROWS))]
        for name, content in (("SST-2", lines), ("STS-B", ["sentence1\tsentence2\tscore", *pairs])):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.tsv").write_text("\n".join(content) + "\n")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents of plain text."""
    folder = tmp_path_factory.mktemp("text")
    sentences = " ".join(f"{a} saw {b} in {c} ." for a in ("john", "mary") for b in WORDS for c in ("paris", "rome"))
    (folder / "a.txt").write_text(f"{sentences}\n\n{sentences[::-1]}\n")
    return folder
