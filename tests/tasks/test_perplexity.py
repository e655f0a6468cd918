"""Language modelling as a task: against transformers' own loss, next words and masked ones, and what has no words."""

import json
import math
import pathlib
import string
from typing import Any

import pytest
import torch
import transformers

import compresskit
import compresskit.tasks as tasks
from compresskit.errors import CheckpointError, DataError, OptionError
from tests.tasks.conftest import tiny_config

TASK = tasks.find_task("perplexity")
TEXT = "the film was good\nwe saw a very bad film .\nwho saw it ?\n"


def decoder(folder: pathlib.Path) -> pathlib.Path:
    """A tiny GPT-2 whose words are letters."""
    torch.manual_seed(0)
    vocab = {token: i for i, token in enumerate(("<|endoftext|>", *string.ascii_lowercase, "Ġ", "Ċ", ".", "?"))}
    config = transformers.GPT2Config(
        vocab_size=len(vocab), n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.GPT2Tokenizer(vocab=vocab, merges=[], model_max_length=32).save_pretrained(folder)
    return folder


def masked(encoder: pathlib.Path, folder: pathlib.Path, kind: str = "BertForMaskedLM") -> pathlib.Path:
    torch.manual_seed(0)
    getattr(transformers, kind)(tiny_config(initializer_range=0.3)).save_pretrained(folder)
    tasks.tokenizer_for(encoder).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "dev.txt").write_text(TEXT)
    return folder


def scored(folder: pathlib.Path, text: Any, **how: Any) -> dict[str, float]:
    return tasks.evaluate(tasks.model_for(TASK, folder), tasks.tokenizer_for(folder), TASK, text, **how)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_it_is_the_exponential_of_transformers_loss(
    batch_size: int, tmp_path: pathlib.Path, text: pathlib.Path
) -> None:
    folder = decoder(tmp_path / "model")
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), tasks.tokenizer_for(folder)
    whole = tokenizer("\n\n".join(TEXT.strip().split("\n")), return_tensors="pt")["input_ids"]
    windows = [window for window in whole.split(20, dim=1) if window.shape[1] > 1]
    losses = [float(model(window, labels=window).loss.detach()) * (window.shape[1] - 1) for window in windows]
    mean = sum(losses) / sum(window.shape[1] - 1 for window in windows)
    found = scored(folder, text, batch_size=batch_size, max_length=20)
    assert list(found) == ["log_likelihood", "perplexity", "word_accuracy"]
    assert found["log_likelihood"] == pytest.approx(-mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    right = sum(int((model(w).logits[0, :-1].argmax(-1) == w[0, 1:]).sum()) for w in windows)
    assert found["word_accuracy"] == pytest.approx(right / sum(w.shape[1] - 1 for w in windows))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_masked_words_are_the_same_for_every_model(
    kind: str, encoder: pathlib.Path, tmp_path: pathlib.Path, text: pathlib.Path
) -> None:
    folder = masked(encoder, tmp_path / "model", kind)
    model, tokenizer = tasks.model_for(TASK, folder), tasks.tokenizer_for(folder)
    features = tasks.tokenized(tasks.load_task_data(TASK, text, "dev"), TASK, tokenizer, max_length=12)
    batch = tasks.PretrainingCollator(tasks.collator(tokenizer))(list(features))
    labels = batch.pop("labels")
    output = model(**batch)
    logits = output.logits if kind == "BertForMaskedLM" else output.prediction_logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for batch_size in (1, 3):
        found = scored(folder, text, max_length=12, batch_size=batch_size)
        assert found["log_likelihood"] == pytest.approx(-float(loss.detach()), rel=1e-5)


def test_windows_hold_every_token_once_between_special_ones(encoder: pathlib.Path, text: pathlib.Path) -> None:
    tokenizer = tasks.tokenizer_for(encoder)
    features = tasks.tokenized(tasks.load_task_data(TASK, text, "dev"), TASK, tokenizer, max_length=8)
    words = [i for row in features for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert words == tokenizer(TEXT.replace("\n", " "), add_special_tokens=False)["input_ids"]
    for row in features:
        assert (row["input_ids"][0], row["input_ids"][-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert row["length"] == len(row["input_ids"]) == len(row["labels"]) <= 8
    assert [row["example"] for row in features] == [0, 1, 2]


def test_text_is_read_from_files_of_any_form(tmp_path: pathlib.Path) -> None:
    folder = decoder(tmp_path / "model")
    rows = [{"text": line} for line in ("", *TEXT.strip().split("\n"), " ")]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "lines.raw").write_text(TEXT)
    assert scored(folder, tmp_path / "rows.jsonl") == scored(folder, tmp_path / "lines.raw")


def test_a_compressed_decoder_is_scored_as_well(tmp_path: pathlib.Path, text: pathlib.Path) -> None:
    folder = decoder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    compresskit.compress(model, "svd", ratio=1.5, include="*mlp*")
    model.save_pretrained(tmp_path / "small")
    tasks.tokenizer_for(folder).save_pretrained(tmp_path / "small")
    whole, small = scored(folder, text), scored(tmp_path / "small", text)
    assert small["perplexity"] != whole["perplexity"]
    assert small["perplexity"] == pytest.approx(math.exp(-small["log_likelihood"]))


def test_models_without_a_head_for_words_are_refused(encoder: pathlib.Path, text: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="a BertModel, which predicts no words"):
        tasks.model_for(TASK, encoder)
    model, tokenizer = transformers.AutoModel.from_pretrained(encoder), tasks.tokenizer_for(encoder)
    with pytest.raises(DataError, match="BertModel predicts no words, by which perplexity is scored"):
        tasks.evaluate(model, tokenizer, TASK, text)


def test_what_cannot_be_scored_is_refused(tmp_path: pathlib.Path, encoder: pathlib.Path) -> None:
    (tmp_path / "other.txt").write_text(TEXT)
    with pytest.raises(DataError, match=r"no split 'dev' of perplexity .* found other.txt"):
        tasks.load_task_data(TASK, tmp_path, "dev")
    for name, content, match in (("empty.txt", "\n \n", "holds no text"), ("one.txt", "x", "nothing to predict")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=match):
            scored(decoder(tmp_path / "model"), tmp_path / name)
    (tmp_path / "rows.csv").write_text("title,label\na,b\n")
    with pytest.raises(DataError, match="no column 'text' or 'sentence' or 'content'"):
        tasks.load_task_data(TASK, tmp_path / "rows.csv", "dev")


def test_less_perplexity_is_better_so_it_chooses_nothing() -> None:
    with pytest.raises(OptionError, match="put log_likelihood first"):
        tasks.custom_task("language-modelling", ("text",), metrics=("perplexity",))


def test_a_column_of_ones_own(tmp_path: pathlib.Path) -> None:
    folder = decoder(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("body,title\nthe film,x\nwas good,y\n")
    model, tokenizer = tasks.model_for(TASK, folder), tasks.tokenizer_for(folder)
    ours = tasks.evaluate(model, tokenizer, tasks.custom_task("language-modelling", ("body",)), tmp_path / "rows.csv")
    (tmp_path / "same.txt").write_text("the film\nwas good\n")
    assert ours == tasks.evaluate(model, tokenizer, TASK, tmp_path / "same.txt")
    with pytest.raises(OptionError, match="leave out label column"):
        tasks.custom_task("language-modelling", ("body",), "title")


def test_windows_are_no_longer_than_the_model(tmp_path: pathlib.Path, text: pathlib.Path) -> None:
    """Also where its tokenizer has no limit."""
    folder = decoder(tmp_path / "model")
    tasks.tokenizer_for(folder).save_pretrained(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"model_max_length": 10**30}))
    assert tasks.tokenizer_for(folder).model_max_length == 32
    assert scored(folder, text)["perplexity"] > 1


def test_two_models_are_compared_in_nats(tmp_path: pathlib.Path, text: pathlib.Path) -> None:
    folder = decoder(tmp_path / "model")
    model, tokenizer = tasks.model_for(TASK, folder), tasks.tokenizer_for(folder)
    one = tasks.run_evaluation(model, tokenizer, TASK, text, max_length=20)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0)  # every word is as likely
    other = tasks.run_evaluation(model, tokenizer, TASK, text, max_length=20)
    assert tasks.agreement(TASK, one.predictions, one.predictions) == {"mean_difference": 0}
    assert tasks.agreement(TASK, one.predictions, other.predictions)["mean_difference"] > 0.1
