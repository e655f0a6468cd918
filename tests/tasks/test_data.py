"""Reading and checking: the layouts that work as they are, and complaints that name file and line."""

import json
import pathlib
from typing import Any

import datasets
import pytest

import compresskit.tasks as tasks
from compresskit.errors import DataError
from tests.tasks.conftest import Write

OWN = tasks.custom_task("classification", ("text",), label_names=("no", "yes"))
TSV = "text\tlabel\n"


def load(task: str | tasks.Task, data: Any, split: str = "dev") -> Any:
    return tasks.load_task_data(tasks.find_task(task) if isinstance(task, str) else task, data, split)


def test_glue_layouts_work_as_they_are(write: Write, tmp_path: pathlib.Path) -> None:
    write("glue/CoLA/dev.tsv", 'gj04\t1\t\tHe said "hm.\ngj04\t0\t*\tThem ran.\n')
    write("glue/MRPC/dev.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tone\tuno\r\n")
    write("glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tone\tuno\tnot_entailment\n")
    write("glue/MNLI/dev_matched.tsv", "sentence1\tsentence2\tgold_label\none\tuno\tcontradiction\n")
    write("glue/MNLI/dev_mismatched.tsv", "sentence1\tsentence2\tgold_label\nsix\tsei\tneutral\n")
    write("glue/STS-B/dev.tsv", "index\tsentence1\tsentence2\tscore\n0\tone\tuno\t3.8\n")
    assert load("cola", tmp_path)[:] == {"text": ['He said "hm.', "Them ran."], "label": [1, 0]}
    assert load("mrpc", tmp_path / "glue")[0] == {"text": "one", "text_pair": "uno", "label": 1}
    assert load("rte", tmp_path / "glue" / "RTE")[0]["label"] == 1
    assert load("mnli", tmp_path)[0] == {"text": "one", "text_pair": "uno", "label": 2}
    assert load("mnli", tmp_path, "dev-mismatched")[0] == {"text": "six", "text_pair": "sei", "label": 1}
    assert load("stsb", tmp_path)["label"][:] == pytest.approx([3.8])
    assert load("sts", tmp_path)[0] == load("stsb", tmp_path)[0]


ROWS = [{"text": 'a, "b"', "label": "yes"}, {"text": "tab\tbed", "label": "no"}]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet", "parquet-shards"])
def test_every_format_gives_the_same_examples(suffix: str, write: Write, tmp_path: pathlib.Path) -> None:
    if suffix == "csv":
        write("validation.csv", 'label,text\nyes,"a, ""b"""\nno,tab\tbed\n')
    elif suffix == "json":
        write("validation.json", json.dumps(ROWS, indent=1))
    elif suffix == "jsonl":
        write("validation.jsonl", ROWS)
    else:
        shards = [ROWS] if suffix == "parquet" else [ROWS[:1], ROWS[1:]]
        for i, rows in enumerate(shards):
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"validation-{i:05}-of-{len(shards):05}.parquet")
    assert load(OWN, tmp_path)[:] == {"text": [row["text"] for row in ROWS], "label": [1, 0]}


def test_one_file_is_whatever_split_is_asked_for(write: Write) -> None:
    path = write("mine.tsv", TSV + "good\tyes\n")
    assert load(OWN, path, "test").num_rows == 1


def test_labels_are_read_by_name_by_number_and_in_any_spelling(write: Write) -> None:
    path = write("dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tNot Entailment\na\tb\t0\na\tb\tnot-entailment\n")
    assert load("rte", path)["label"][:] == [1, 0, 1]


def test_columns_of_files_without_a_header_can_be_named(write: Write) -> None:
    task = tasks.with_columns(tasks.find_task("mrpc"), file_columns=("sentence1", "sentence2", "label"))
    assert load(task, write("dev.tsv", "a\tb\t1\nc\td\t0\n"))["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("dev.tsv", TSV + "good\tyes\nbad\n", r"dev\.tsv, line 3: 1 fields where 2 columns"),
        ("dev.tsv", TSV + "good\tyes\tno\n", r"line 2: 3 fields where 2 columns"),
        ("dev.tsv", TSV + "good\tyes\n\nbad\tno\n", r"line 3: the line is empty"),
        ("dev.tsv", TSV + " \tyes\n", r"line 2: the text is empty"),
        ("dev.tsv", TSV + "good\tyes\nbad\tmaybe\n", r"line 3: unknown label 'maybe'; the labels are no, yes"),
        ("dev.tsv", TSV + "good\t2\n", r"line 2: the label '2' is not below 2"),
        ("dev.tsv", TSV + "good\t\n", r"line 2: there is no label"),
        ("dev.tsv", "text\tlable\ngood\tyes\n", r"has no column 'label' or 'score'; its columns are 'text', 'lable'"),
        ("dev.tsv", "text\ttext\tlabel\n", r"line 1: two columns have the same name"),
        ("dev.tsv", TSV, r"dev\.tsv has no rows"),
        ("dev.tsv", "", r"dev\.tsv has no rows"),
        ("dev.csv", 'text,label\n"good,yes\n', r"dev\.csv, line 2: unexpected end of data"),
        ("dev.csv", 'text,label\n"two\nlines",yes\nbad\n', r"dev\.csv, line 4: 1 fields"),
        ("dev.jsonl", '{"text": "a", "label": 1}\n{"text": }\n', r"line 2: not JSON \(Expecting value at column 10\)"),
        ("dev.jsonl", '{"text": "a", "label": 1}\n[1]\n', r"line 2: a JSON object is expected, found list"),
        ("dev.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', r"line 2: the column 'label' is missing"),
        ("dev.jsonl", '{"text": 3, "label": 1}\n', r"line 1: the column 'text' is no text but 3"),
        ("dev.json", '{"rows": []}', r"neither a list of objects nor a SQuAD file"),
        ("dev.json", "[1,\n2", r"dev\.json, line 2: not JSON"),
        ("dev.parquet", "no parquet", r"cannot be read as Parquet"),
    ],
)
def test_what_is_malformed_is_named_with_its_line(name: str, text: str, match: str, write: Write) -> None:
    with pytest.raises(DataError, match=match):
        load(OWN, write(name, text))


def test_what_is_not_utf8_is_named_with_its_line(write: Write) -> None:
    with pytest.raises(DataError, match=r"line 2: not UTF-8 \(.* at byte 2\)"):
        load(OWN, write("dev.tsv", TSV + "caf\xe9\tyes\n"[1:], encoding="latin-1"))


@pytest.mark.parametrize(("label", "match"), [("x", "not a number"), ("nan", "not finite"), ("", "there is no label")])
def test_a_regression_needs_finite_numbers(label: str, match: str, write: Write) -> None:
    path = write("dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t1.5\na\tb\t{label}\n")
    with pytest.raises(DataError, match=rf"line 3: .*{match}"):
        load("stsb", path)


def test_what_is_not_there_is_said_with_what_is(write: Write, tmp_path: pathlib.Path) -> None:
    write("SST-2/train.tsv", "sentence\tlabel\ngood\t1\n")
    with pytest.raises(DataError, match=r"no split 'dev' of sst2 in .*SST-2: looked for dev\.\* .*found train\.tsv"):
        load("sst2", tmp_path)
    with pytest.raises(DataError, match="there is no file or folder nowhere, and a hub id is written owner/name"):
        load("sst2", "nowhere")
    write("SST-2/train.csv", "")
    with pytest.raises(DataError, match=r"several files that could be the split 'train'.*train\.csv, train\.tsv"):
        load("sst2", tmp_path, "train")
    with pytest.raises(DataError, match="custom has no data of its own"):
        load(OWN, None)


def test_without_a_connection_the_error_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"nyu-mll/glue:rte cannot be loaded from the hub.*give a folder"):
        load("rte", None)
    with pytest.raises(DataError, match="someone/reviews:small cannot be loaded"):
        load(OWN, "someone/reviews:small")


def test_labels_of_hub_data_go_by_name_not_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    found = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    monkeypatch.setattr("compresskit.tasks.data.load_hub", lambda source, task, split: found)
    assert load(OWN, "someone/reviews")["label"][:] == [1, 0]
    unlabelled = datasets.Dataset.from_dict({"text": ["good"], "label": [-1]}, features=features)
    monkeypatch.setattr("compresskit.tasks.data.load_hub", lambda source, task, split: unlabelled)
    with pytest.raises(DataError, match="someone/reviews, split test, row 1: there is no label"):
        load(OWN, "someone/reviews", "test")


def test_labels_are_inferred_from_the_training_data(write: Write, tmp_path: pathlib.Path) -> None:
    write("train.tsv", TSV + "a\tpear\nb\tapple\nc\tpear\n")
    write("dev.tsv", TSV + "a\tplum\n")
    task = tasks.with_labels_of(tasks.custom_task("classification", ("text",)), tmp_path)
    assert task.label_names == ("apple", "pear")
    with pytest.raises(DataError, match=r"dev\.tsv, line 2: unknown label 'plum'; the labels are apple, pear"):
        load(task, tmp_path)
    write("train.tsv", TSV + "a\t10\nb\t9\n")
    assert tasks.with_labels_of(tasks.custom_task("classification", ("text",)), tmp_path).label_names == ("9", "10")
    write("train.tsv", TSV + "a\tpear\n")
    with pytest.raises(DataError, match=r"one label only \(pear\)"):
        tasks.with_labels_of(tasks.custom_task("classification", ("text",)), tmp_path)


def test_conll_columns_are_read(write: Write) -> None:
    text = "-DOCSTART- -X- O\n\nJohn NNP B-PER\nruns VBZ O\n\nRome NNP B-LOC\n"
    found = load("conll2003", write("eng.testa", text))
    assert found["tokens"][:] == [["John", "runs"], ["Rome"]]
    assert found["tags"][:] == [[1, 0], [5]]
    with pytest.raises(DataError, match=r"line 4: a token and its tag are expected, found 'runs'"):
        load("conll2003", write("dev.txt", "-DOCSTART-\n\nJohn B-PER\nruns\n"))
    with pytest.raises(DataError, match=r"line 3: unknown label 'B-XYZ'"):
        load("conll2003", write("dev.txt", "John B-PER\n\nMary B-XYZ\n"))
    with pytest.raises(DataError, match=r"line 1: 2 tokens need as many tags"):
        load("conll2003", write("dev.jsonl", [{"tokens": ["a", "b"], "ner_tags": ["O"]}]))


def squad(context: str, *questions: dict[str, Any]) -> str:
    return json.dumps({"version": "2.0", "data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]})


def test_squad_files_and_flat_rows_give_the_same(write: Write) -> None:
    asked = {"id": "q1", "question": "who?", "answers": [{"text": "John", "answer_start": 0}]}
    flat = {"id": "q1", "question": "who?", "context": "John ran", "answers": {"text": ["John"], "answer_start": [0]}}
    found = load("squad", write("SQuAD/dev-v1.1.json", squad("John ran", asked)).parent)
    assert found[:] == load("squad", write("flat.jsonl", [flat]))[:]
    assert found[0]["answer_starts"] == [0]
    free = {"id": "q2", "question": "why?", "answers": [], "is_impossible": True}
    assert load("squad-v2", write("dev-v2.0.json", squad("John ran", asked, free)))["answer_texts"][:] == [["John"], []]
    with pytest.raises(DataError, match="question q2: the question has no answer; the task squad wants one"):
        load("squad", write("x.json", squad("John ran", free)))
    with pytest.raises(DataError, match="question q1: the question or the context is empty"):
        load("squad", write("y.json", squad("", asked)))
    with pytest.raises(DataError, match="a second question has the id 'q1'"):
        load("squad", write("z.json", squad("John ran", asked, asked)))


@pytest.mark.parametrize(
    ("name", "split", "rows", "positive"),
    [
        ("sst2", "dev", 872, 444),
        ("cola", "dev", 1043, 721),
        ("mrpc", "dev", 408, 279),
        ("rte", "dev", 277, 131),
        ("wnli", "dev", 71, 31),
        ("mrpc", "train", 3668, 2474),
        ("stsb", "dev", 1500, None),
        ("qnli", "dev", 5463, None),
    ],
)
def test_real_glue(name: str, split: str, rows: int, positive: int | None, real_data: pathlib.Path) -> None:
    found = load(name, real_data, split)
    assert found.num_rows == rows
    if positive is not None:
        assert sum(found["label"]) == positive
