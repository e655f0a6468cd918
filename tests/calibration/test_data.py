"""What may be given as data, and what is refused."""

import datasets
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from compresskit.calibration import calibrate, read_batches
from compresskit.errors import CalibrationError, DataError
from tests.models import build

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "a", "small", "text", "of", "words"]
TEXT = "this is a small text"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def sizes(batches):
    return [tuple(batch["input_ids"].shape) for batch in batches]


def test_a_folder_is_sampled_the_same_way_each_time(tokenizer, tmp_path):
    (tmp_path / "deep").mkdir()
    lines = [f"{TEXT} of {'words ' * (n % 4)}" for n in range(50)]
    (tmp_path / "deep" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("1. heading\n" + TEXT)
    first = [b["input_ids"] for b in read_batches(tmp_path, tokenizer, samples=10, batch_size=4)]
    again = [b["input_ids"] for b in read_batches(tmp_path, tokenizer, samples=10, batch_size=4)]
    assert [len(ids) for ids in first] == [4, 4, 2]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = [b["input_ids"] for b in read_batches(tmp_path, tokenizer, samples=10, batch_size=4, seed=1)]
    assert not all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert len(next(iter(read_batches(tmp_path, tokenizer, samples=1000, batch_size=100)))["input_ids"]) == 51


def test_texts_are_cut_to_max_length(tokenizer):
    assert sizes(read_batches([TEXT * 9] * 3, tokenizer, max_length=6, batch_size=2)) == [(2, 6), (1, 6)]


def test_a_dataset_of_texts_or_of_ids(tokenizer):
    texts = datasets.Dataset.from_dict({"number": [1, 2], "text": [TEXT, TEXT + " of words"]})
    assert sizes(read_batches(texts, tokenizer)) == [(2, 9)]
    ids = datasets.Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 5, 6, 7, 3]], "label": [0, 1], "text": ["a", "b"]})
    batch = next(iter(read_batches(ids)))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert set(batch) == {"input_ids", "attention_mask", "label"}
    with pytest.raises(DataError, match="no column 'input_ids' and not one column of texts; it has: a, b"):
        list(read_batches(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), tokenizer))


def test_batches_are_taken_until_there_are_enough(tokenizer):
    loader = DataLoader([{"input_ids": torch.arange(4)} for _ in range(20)], batch_size=4)
    assert sizes(read_batches(loader, samples=7)) == [(4, 4), (4, 4)]
    assert sizes(read_batches(({"input_ids": torch.zeros(2, 3)} for _ in range(3)), samples=100)) == [(2, 3)] * 3


def test_columns_that_the_model_does_not_take_are_left_out(tokenizer):
    batch = {"input_ids": torch.arange(4, 8)[None], "length": torch.tensor([4]), "labels": torch.tensor([0])}
    assert calibrate(build("bert"), [batch]).tokens == 4
    with pytest.raises(CalibrationError, match="BertModel takes none of length; its arguments: attention_mask"):
        calibrate(build("bert"), [{"length": torch.tensor([4])}])


def test_a_tokenizer_without_padding_token_is_not_changed():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<end>"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    batch = next(iter(read_batches([TEXT, TEXT + " of words"], fast)))
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert fast.pad_token is None


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ("nowhere.txt", DataError, "there is no file or folder nowhere.txt"),
        ([(torch.zeros(1), 2)], DataError, "batch 0 is a tuple, not a mapping of argument names to tensors"),
        ([], CalibrationError, "the data holds no sample"),
        (7, DataError, "takes a text file or folder, texts, a dataset or batches; got int"),
        ([TEXT], CalibrationError, "texts need tokenizer="),
    ],
)
def test_data_that_cannot_be_used(data, error, match):
    with pytest.raises(error, match=match):
        calibrate(build("bert"), data)


def test_text_that_is_not_utf8_or_too_short(tokenizer, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a fine first line of text\n" + "une ligne de texte fran\xe7aise".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt, line 2: not UTF-8 \(invalid continuation byte at byte 23\)"):
        calibrate(build("bert"), path, tokenizer=tokenizer)
    path.write_text("short\n\nlines\n")
    with pytest.raises(DataError, match="holds no text of at least 5 words"):
        calibrate(build("bert"), path, tokenizer=tokenizer)


@pytest.mark.parametrize("option", ["samples", "max_length", "batch_size"])
def test_counts_are_at_least_one(option):
    with pytest.raises(CalibrationError, match=f"{option} is a count, at least 1; got 0"):
        calibrate(build("bert"), [TEXT], tokenizer=lambda texts: texts, **{option: 0})
