"""Plain text: what a document is, where it is cut, and that nothing is lost."""

import itertools
import pathlib
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compresskit.tasks as tasks
from compresskit.errors import DataError, OptionError
from compresskit.tasks.corpus import cut, documents, text_files
from tests.tasks.conftest import Write


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 20), st.booleans())
def test_pieces_cover_all_tokens_in_order_and_fit(sentences: list[int], room: int, whole: bool) -> None:
    ends = [sum(sentences[: i + 1]) for i in range(len(sentences))]
    pieces = list(cut(ends, room, whole=whole))
    assert [i for start, end in pieces for i in range(start, end)] == list(range(ends[-1]))
    assert all(0 < end - start <= room for start, end in pieces)
    edges = {end for _, end in pieces}
    if not whole:
        assert set(ends) <= edges
    else:
        for (start, end), (_, following) in itertools.pairwise(pieces):
            if end in ends:  # the next sentence would not have fitted
                assert min(e for e in ends if e > end) - start > room
            else:
                assert end - start == room
                assert following > end


def test_blank_lines_part_documents_and_otherwise_each_line_is_one(write: Write, tmp_path: pathlib.Path) -> None:
    write("text/b.txt", "\ufeffone\ntwo\n \n\nthree\n")
    write("text/deep/a.txt", "four\nfive\n")
    write("text/readme.md", "no text")
    files = text_files(tmp_path / "text")
    assert [file.name for file in files] == ["b.txt", "a.txt"]
    assert list(documents(files)) == ["one two", "three", "four", "five"]


def test_rows_are_whole_sentences_with_special_tokens(tokenizer: Any, write: Write, tmp_path: pathlib.Path) -> None:
    path = write("a.txt", "the film was good . we saw a bad film ! is the film bad ?\n\njohn lives in rome .\n\nthe\n")
    found = tasks.load_corpus(path, tokenizer, cache=tmp_path / "cache", max_length=16, min_tokens=4)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in found["input_ids"]]
    assert texts == ["the film was good. we saw a bad film!", "is the film bad?", "john lives in rome."]
    assert found["document"][:] == [0, 0, 1]
    assert {(row[0], row[-1]) for row in found["input_ids"]} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    assert found["length"][:] == [len(row) for row in found["input_ids"]] == [13, 7, 7]
    batch = tasks.collator(tokenizer)(list(found))
    assert batch["attention_mask"].sum(1).tolist() == [13, 7, 7]
    single = tasks.load_corpus(path, tokenizer, cache=tmp_path / "cache", max_length=16, min_tokens=4, unit="sentence")
    assert single["length"][:] == [7, 8, 7, 7]


def test_a_corpus_is_memory_mapped_and_read_once(tokenizer: Any, write: Write, tmp_path: pathlib.Path) -> None:
    path = write("text/a.txt", "the film was good . john lives in rome .\n")
    how = {"cache": tmp_path / "cache", "max_length": 32}
    first = tasks.load_corpus(path.parent, tokenizer, **how)
    assert first.cache_files
    assert all(pathlib.Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in first.cache_files)
    assert tasks.load_corpus(path.parent, tokenizer, **how).cache_files == first.cache_files
    path.write_text("mary walked in paris . john lives in rome .\n")
    assert tasks.load_corpus(path.parent, tokenizer, **how)["input_ids"][:] != first["input_ids"][:]


def test_what_is_no_corpus_is_refused(tokenizer: Any, write: Write, tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there is no \*\.txt in .*empty"):
        tasks.load_corpus(tmp_path / "empty", tokenizer, cache=cache, max_length=16)
    with pytest.raises(DataError, match="holds no text of at least 8 tokens"):
        tasks.load_corpus(write("short.txt", "a film\n"), tokenizer, cache=cache, max_length=16)
    latin = write("latin.txt", "a\ncaf\xe9\n", encoding="latin-1")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        tasks.load_corpus(latin, tokenizer, cache=cache, max_length=16)
    with pytest.raises(OptionError, match="max_length 500 is not between 8 and 64"):
        tasks.load_corpus(tmp_path, tokenizer, cache=cache, max_length=500)
    with pytest.raises(DataError, match="load_corpus reads it"):
        tasks.load_task_data(tasks.find_task("text"), tmp_path)


def test_hub_text_is_read_from_its_column(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = datasets.Dataset.from_dict({"text": ["the film was good .", " "]})
    monkeypatch.setattr("compresskit.tasks.corpus.load_hub", lambda source, task, split: found)
    rows = tasks.load_corpus("someone/text:en", tokenizer, cache=tmp_path, max_length=16, min_tokens=4)
    assert rows["length"][:] == [7]
