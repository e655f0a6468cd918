"""Tokens, labels at tokens, windows over long contexts, and padding."""

import pathlib
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import compresskit.tasks as tasks
from compresskit.errors import DataError, OptionError
from compresskit.tasks.metrics import predictions_of, score
from tests.tasks.conftest import Write

TAGS = tasks.find_task("conll2003")


def examples(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict(columns)


def test_pairs_have_types_and_lengths(tokenizer: Any) -> None:
    rows = examples(text=["a good film", "bad"], text_pair=["the film is good", "not good"], label=[1, 0])
    found = tasks.tokenized(rows, tasks.find_task("mrpc"), tokenizer)
    assert found["length"][:] == [3 + 3 + 4, 3 + 1 + 2]
    assert found[1]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert found["labels"][:] == [1, 0]
    assert found["example"][:] == [0, 1]
    short = tasks.tokenized(rows, tasks.find_task("mrpc"), tokenizer, max_length=8)
    assert max(short["length"]) == 8


@pytest.mark.parametrize("length", [7, 65])
def test_a_length_that_the_model_cannot_take_is_refused(length: int, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match=f"max_length {length} is not between 8 and the 64 tokens"):
        tasks.tokenized(examples(text=["a"], label=[0]), tasks.find_task("sst2"), tokenizer, max_length=length)


def test_a_cache_is_used_again_and_depends_on_the_length(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    rows, task = examples(text=["a good film"], label=[1]), tasks.find_task("sst2")
    plain = tasks.tokenized(rows, task, tokenizer)
    assert plain.cache_files == []
    first = tasks.tokenized(rows, task, tokenizer, cache=tmp_path)
    assert [pathlib.Path(file["filename"]).parent for file in first.cache_files] == [tmp_path]
    again = tasks.tokenized(rows, task, tokenizer, cache=tmp_path)
    assert again.cache_files == first.cache_files
    assert first[:] == again[:] == plain[:]
    tasks.tokenized(rows, task, tokenizer, cache=tmp_path, max_length=16)
    assert len(list(tmp_path.glob("sst2-*.arrow"))) == 2


def test_only_the_first_piece_of_a_word_has_its_tag(tokenizer: Any) -> None:
    rows = examples(tokens=[["john", "walks", "in", "paris"]], tags=[[1, 0, 0, 5]])
    found = tasks.tokenized(rows, TAGS, tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(found["input_ids"])[2:4] == ["walk", "##s"]
    assert found["labels"] == [-100, 1, 0, -100, 0, 5, -100]


def test_words_that_are_cut_off_count_as_missed(tokenizer: Any) -> None:
    rows = examples(tokens=[["john"] * 10, ["mary", "lives"]], tags=[[1] * 10, [1, 0]])
    features = tasks.tokenized(rows, TAGS, tokenizer, max_length=8)
    perfect = [np.eye(9)[np.maximum(row["labels"], 0)] for row in features]
    predictions = predictions_of(TAGS, perfect, features, rows)
    assert predictions == [["B-PER"] * 6 + ["O"] * 4, ["B-PER", "O"]]
    found = score(TAGS, predictions, rows)
    assert found["entity_precision"] == 1
    assert found["entity_recall"] == pytest.approx(7 / 11)


def long_question() -> Any:
    context = " ".join(["the film was good ."] * 12 + ["john lives in paris ."] + ["mary walked in rome ."] * 12)
    return examples(
        id=["a", "b", "c"],
        question=["where lives john ?", " who walked ?", "is the film bad ?"],
        context=[context] * 3,
        answer_texts=[["paris"], ["mary"], []],
        answer_starts=[[context.index("paris")], [context.index("mary")], []],
    )


def test_perfect_scores_in_every_window_give_every_answer_back(tokenizer: Any) -> None:
    """The whole way: windows, positions of answers, best span over windows, characters, official scores."""
    task, rows = tasks.find_task("squad-v2"), long_question()
    features = tasks.tokenized(rows, task, tokenizer, max_length=32)
    assert len(features) > 3 * 3
    assert max(features["length"]) <= 32
    outputs = []
    for row in features:
        scores = np.full((2, row["length"]), -5.0)
        scores[0, row["start_positions"]] = scores[1, row["end_positions"]] = 5.0
        scores[:, 0] += 4.0  # no answer at -1 beats nothing but emptiness
        outputs.append(scores)
    answers = predictions_of(task, outputs, features, rows)
    assert [answer.given(0.0) for answer in answers] == ["paris", "mary", ""]
    found = score(task, answers, rows)
    assert list(found)[:2] == ["answer_f1", "exact_match"]
    assert found["exact_match"] == found["answer_f1_has_answer"] == found["answer_f1_no_answer"] == 1


def test_an_answer_is_in_its_window_or_the_window_says_there_is_none(tokenizer: Any) -> None:
    rows = long_question()
    features = tasks.tokenized(rows, tasks.find_task("squad-v2"), tokenizer, max_length=32)
    found = set()
    for row in features:
        start, end = row["start_positions"], row["end_positions"]
        if (start, end) != (0, 0):
            chars = row["offsets"][start][0], row["offsets"][end][1]
            found.add(rows[row["example"]]["context"][slice(*chars)])
    assert found == {"paris", "mary"}


def test_a_question_that_leaves_no_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="max_length 16 leaves no room for the context"):
        tasks.tokenized(long_question(), tasks.find_task("squad"), tokenizer, max_length=16)


def test_batches_are_padded_on_the_right_and_hold_what_models_take(tokenizer: Any) -> None:
    rows = examples(tokens=[["john", "walks"], ["mary"]], tags=[[1, 0], [1]])
    features = tasks.tokenized(rows, TAGS, tokenizer)
    batch = tasks.collator(tokenizer, multiple_of=4)(list(features))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 8)}
    assert batch["attention_mask"].sum(1).tolist() == features["length"][:]
    assert batch["labels"][1].tolist() == [-100, 1, *[-100] * 6]
    assert (batch["input_ids"][1, 3:] == tokenizer.pad_token_id).all()
    regression = tasks.tokenized(
        examples(text=["a"], text_pair=["the"], label=[2.5]), tasks.find_task("stsb"), tokenizer
    )
    torch.testing.assert_close(tasks.collator(tokenizer)(list(regression))["labels"], torch.tensor([2.5]))


def test_a_tokenizer_without_padding_gets_one(encoder: pathlib.Path, write: Write) -> None:
    tokenizer = tasks.tokenizer_for(encoder)
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="no padding token; open it with tokenizer_for"):
        tasks.collator(tokenizer)
