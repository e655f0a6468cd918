"""Masked words and sentence pairs: what the labels are, and that they depend on the text and the seed alone."""

from collections import Counter

import datasets
import pytest
import torch
from torch import nn

import compresskit.tasks as tasks
from compresskit.errors import DataError
from compresskit.tasks.features import IGNORED


def rows(count=40, length=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 29, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3  # [CLS] and [SEP]
    return [{"input_ids": row, "attention_mask": [1] * length, "length": length} for row in ids.tolist()]


def test_a_seventh_of_the_words_is_to_be_guessed_most_of_them_masked(tokenizer):
    collate = tasks.PretrainingCollator(tasks.collator(tokenizer))
    texts = rows(count=400)
    batch = collate(texts)
    ids = torch.tensor([row["input_ids"] for row in texts])
    chosen = batch["labels"] != IGNORED
    torch.testing.assert_close(batch["labels"][chosen], ids[chosen])
    torch.testing.assert_close(batch["input_ids"][~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()
    assert chosen.any(1).all()
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.02)
    masked = (batch["input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    kept = (batch["input_ids"][chosen] == ids[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.04)
    assert kept == pytest.approx(0.1, abs=0.04)


def test_masks_do_not_depend_on_the_batch_but_on_the_seed(tokenizer):
    collate = tasks.PretrainingCollator(tasks.collator(tokenizer))
    whole, part = collate(rows()), collate(rows()[7:9])
    torch.testing.assert_close(whole["input_ids"][7:9], part["input_ids"])
    other = tasks.PretrainingCollator(tasks.collator(tokenizer), seed=1)(rows())
    assert (other["input_ids"] != whole["input_ids"]).any()


def test_half_of_the_pairs_follow_each_other():
    count = 400
    corpus = datasets.Dataset.from_dict(
        {
            "input_ids": [[2, i, 3] for i in range(count)],
            "length": [3] * count,
            "document": [i // 50 for i in range(count)],
        }
    )
    pairs = tasks.SentencePairs(corpus)
    assert len(pairs) == count
    seen: Counter[int] = Counter()
    for i in range(count):
        pair = pairs[i]
        first, second = pair["input_ids"][1], pair["input_ids"][3]
        assert (first, len(pair["input_ids"])) == (i, pairs["length"][i])
        assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
        follows = second == i + 1 and second // 50 == i // 50
        assert pair["next_sentence_label"] == (0 if follows else 1)
        seen[follows] += 1
    assert seen[True] == pytest.approx(count / 2, abs=40)
    assert tasks.SentencePairs(corpus)[3] == pairs[3]


def test_words_of_pairs_are_masked_too(tokenizer):
    corpus = datasets.Dataset.from_list([{**row, "document": 0} for row in rows(4)])
    pairs = tasks.SentencePairs(corpus)
    batch = tasks.PretrainingCollator(tasks.collator(tokenizer))([pairs[0], pairs[1]])
    assert batch["next_sentence_label"].shape == (2,)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["token_type_ids"].shape == (2, 47)


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    class _NoMask:
        mask_token_id = None
        pad_token_id = 0

    with pytest.raises(DataError, match="no mask token"):
        tasks.PretrainingCollator(tasks.collator(_NoMask()))


def test_a_model_opens_with_the_heads_that_its_files_hold(tmp_path, tokenizer):
    """A BERT whose config says masked words, but whose files hold the next-sentence head as well."""
    import json

    import transformers

    from tests.tasks.conftest import tiny_config

    transformers.BertForPreTraining(tiny_config()).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"architectures": ["BertForMaskedLM"]}))
    found = tasks.pretrained(tmp_path)
    assert type(found).__name__ == "BertForPreTraining"
    assert isinstance(found, nn.Module)
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "bare")
    assert type(tasks.pretrained(tmp_path / "bare")).__name__ == "BertModel"
