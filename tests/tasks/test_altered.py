"""Copies with other words: which words, that only seed and text decide, and that there are no labels."""

import datasets
import pytest
import torch
from torch import nn

import compresskit.tasks as tasks
from compresskit.errors import OptionError
from compresskit.tasks.altered import NEAREST
from compresskit.tasks.features import IGNORED

ROWS = 50


def embeddings(tokenizer):
    torch.manual_seed(0)
    return nn.Embedding(len(tokenizer), 16)


def features(length=20, **more):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 28, (ROWS, length), generator=generator)
    ids[:, 0], ids[:, -1] = 2, 3  # [CLS] and [SEP]
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": [[1] * length] * ROWS, "length": [length] * ROWS, **more}
    )


def test_words_become_near_ones_and_special_tokens_stay(tokenizer):
    words = embeddings(tokenizer)
    data = features(labels=[1] * ROWS)
    more = tasks.AlteredTexts(data, words, tokenizer, copies=8, share=0.4)
    assert len(more) == len(more["length"]) == 9 * ROWS
    assert [more[i] for i in range(ROWS)] == [data[i] for i in range(ROWS)]
    before = torch.tensor(data["input_ids"][:]).repeat(8, 1)
    after = torch.tensor([more[i]["input_ids"] for i in range(ROWS, 9 * ROWS)])
    changed = before != after
    assert not changed[:, [0, -1]].any()
    assert changed[:, 1:-1].float().mean() == pytest.approx(0.4, abs=0.02)
    cosines = nn.functional.cosine_similarity(words.weight[:, None], words.weight[None], dim=-1)
    cosines[:, tokenizer.all_special_ids] = -2
    rank = (cosines[before[changed]] > cosines[before[changed], after[changed]][:, None]).sum(1)  # 0 is itself
    assert int(rank.min()) == 1
    assert int(rank.max()) == NEAREST
    assert rank.float().mean() == pytest.approx((NEAREST + 1) / 2, abs=0.3)


def test_a_copy_depends_on_seed_and_example_alone(tokenizer):
    words, data = embeddings(tokenizer), features(labels=[1] * ROWS)
    make = lambda rows, seed: tasks.AlteredTexts(rows, words, tokenizer, copies=2, seed=seed)  # noqa: E731
    whole, part = make(data, 0), make(data.select([7, 9]), 0)
    assert part[2] == whole[ROWS + 7]
    assert part[4] == whole[2 * ROWS + 7] != part[2]
    assert part[2] != make(data, 1)[ROWS + 7]


def test_copies_have_no_labels(tokenizer):
    columns = {
        "labels": ([2] * ROWS, IGNORED),
        "start_positions": ([3] * ROWS, IGNORED),
        "tags": ([[0] * 20] * ROWS, [IGNORED] * 20),
    }
    for name, (values, none) in columns.items():
        column = "labels" if name == "tags" else name
        more = tasks.AlteredTexts(features(**{column: values}), embeddings(tokenizer), tokenizer, copies=1)
        assert more[0][column] == values[0]
        assert more[ROWS][column] == none
    scores = tasks.AlteredTexts(features(labels=[0.5] * ROWS), embeddings(tokenizer), tokenizer, copies=1)
    batch = tasks.collator(tokenizer)([scores[0], scores[ROWS]])
    assert batch["labels"].isinf().tolist() == [False, True]


@pytest.mark.parametrize(("wrong", "match"), [({"copies": 0}, "altered_copies is 0"), ({"share": 0.0}, "share is 0.0")])
def test_what_makes_no_copies_is_refused(wrong, match, tokenizer):
    with pytest.raises(OptionError, match=match):
        tasks.AlteredTexts(features(), embeddings(tokenizer), tokenizer, **{"copies": 1, **wrong})
