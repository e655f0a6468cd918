"""Distillation on plain text as the benchmarks do it: it goes on where it was killed, and measures what it says."""

import copy
import itertools

import pytest
import torch

import compresskit
from benchmarks.corpus import Measure, read_corpus, train_
from benchmarks.embeddings import SENTENCES, read_sentences
from benchmarks.experiments import ExperimentSkipped, SuiteError, make_experiment
from benchmarks.experiments.quality import STS_B
from benchmarks.models import load_model
from compresskit.distill import Objective, make_loss
from compresskit.tasks import TrainSettings

STEPS = 6
SETTINGS = TrainSettings(max_steps=STEPS, lr=1e-3, batch_size=16, eval_steps=2, device="cpu")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Dense model, tokenizer, texts to train on, texts to measure on."""
    model, tokenizer = load_model("tiny", seed=0, sentences=read_sentences())
    cache = tmp_path_factory.mktemp("text")
    return model, tokenizer, *read_corpus(SENTENCES, tokenizer, cache, max_length=32, unit="sentence", held_out=5)


class KilledError(Exception):
    pass


def train(shop, folder, measure=None):
    dense, tokenizer, rows, held_out = shop
    student = copy.deepcopy(dense)
    compresskit.compress(student, "svd", ratio=2)
    objective = Objective(make_loss("hidden-states"), make_loss("sentence-embeddings"))
    measure = measure or Measure(dense, tokenizer, held_out, None)
    return student, train_(student, dense, objective, rows, tokenizer, folder, SETTINGS, measure)


def test_a_training_that_was_killed_goes_on_and_ends_with_the_same_bits_and_curve(shop, tmp_path):
    whole, told = train(shop, tmp_path / "whole")
    measure, calls = Measure(shop[0], shop[1], shop[3], None), []

    def killed(model, projection):
        calls.append(model)
        if len(calls) == 2:
            raise KilledError
        return measure(model, projection)

    with pytest.raises(KilledError):
        train(shop, tmp_path / "halves", killed)
    student, again = train(shop, tmp_path / "halves")
    assert (told.resumed_at, again.resumed_at) == (0, 2)
    assert [point["step"] for point in again.curve] == [2, 4, 6]
    assert again.curve == told.curve
    assert (again.steps, again.tokens) == (told.steps, told.tokens) == (STEPS, told.curve[-1]["tokens"])
    torch.testing.assert_close(student.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_tokens_are_those_of_the_texts_that_were_seen(shop, tmp_path):
    rows = shop[2]
    _, told = train(shop, tmp_path)
    assert told.texts == len(rows)
    epochs = STEPS * SETTINGS.batch_size // len(rows)  # a short batch ends an epoch
    assert 0 < told.tokens - (epochs - 1) * sum(rows["length"]) <= 2 * sum(rows["length"])
    assert told.curve[-1]["hidden_error"] != told.curve[0]["hidden_error"]


def test_held_out_texts_are_not_trained_on(shop):
    _, _, rows, held_out = shop
    assert len(held_out) == 5
    assert not {tuple(ids) for ids in rows["input_ids"]} & {tuple(ids) for ids in held_out["input_ids"]}


def test_the_dense_model_agrees_with_itself_and_another_width_cannot_be_compared(shop):
    dense, tokenizer, _, held_out = shop
    measure = Measure(dense, tokenizer, held_out, None)
    dense.train()
    found = measure(dense)
    assert dense.training
    dense.eval()
    assert found["hidden_error"] == 0
    assert found["mean_cosine"] == pytest.approx(1.0)
    wide = type(dense)(type(dense.config)(**{**dense.config.to_dict(), "hidden_size": 32}))
    assert measure(wide) == {}


def test_a_narrower_student_is_measured_with_its_learned_projection(shop, tmp_path):
    dense, tokenizer, rows, held_out = shop
    options = {"kind": "corpus-distill", "method": "small-dense", "ratio": 2, "model": "tiny"}
    student, report = make_experiment({**options, "options": "smaller.layer_step=2"})._student(dense, rows)
    assert report["params_after"] * 2 <= report["params_before"]
    losses = (make_loss(name, {"projection": "linear"}) for name in ("hidden-states", "sentence-embeddings"))
    measure = Measure(dense, tokenizer, held_out, None)
    told = train_(student, dense, Objective(*losses), rows, tokenizer, tmp_path, SETTINGS, measure)
    assert told.projection_params == student.config.hidden_size * dense.config.hidden_size
    assert told.curve[0]["mean_cosine"] < told.curve[-1]["mean_cosine"] <= 1
    assert not any("hidden_error" in point for point in told.curve)  # the map is learned for directions alone


def test_a_student_is_searched_by_agreement_on_pairs(shop, tmp_path):
    dense, tokenizer, rows, _ = shop
    folder = tmp_path / STS_B.parent
    folder.mkdir(parents=True)
    texts = read_sentences()
    lines = ["sentence1\tsentence2\tscore", *(f"{a}\t{b}\t0" for a, b in itertools.pairwise(texts[:24]))]
    (folder / "train.tsv").write_text("\n".join(lines), "utf-8")
    asked = {"kind": "corpus-distill", "method": "svd", "ratio": 5, "model": "tiny", "calibration": 16, "searched": 16}
    experiment = make_experiment(asked)
    judge = experiment._judge(dense, tokenizer, tmp_path)
    assert judge(dense) == pytest.approx(0, abs=1e-6)
    wrong = [judge(experiment._student(dense, rows, by)[0]) for by in (None, judge)]
    assert 0 < wrong[1] <= wrong[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ExperimentSkipped, "no plain text: give a folder that holds text/ with --data"),
        ({"texts": "own", "part": "head"}, SuiteError, "part is model or encoder, .*got 'head'"),
        ({"texts": "own", "searched": 8}, SuiteError, "searched needs --data, a method, a calibration"),
    ],
)
def test_what_cannot_run_says_why(options, error, message, tmp_path):
    base = {"kind": "corpus-distill", "method": "svd", "ratio": 2, "model": "tiny", "held_out": 4}
    with pytest.raises(error, match=message):
        make_experiment({**base, **options}).run_in(None, tmp_path)


def test_rules_are_part_of_what_is_measured_where_there_are_any():
    asked = {"kind": "corpus-distill", "method": "svd", "ratio": 2.0}
    without, ruled = make_experiment(asked), make_experiment({**asked, "rules": ["*embeddings*=kronecker"]})
    assert "rules" not in without.configuration()
    assert ruled.configuration()["rules"] == ["*embeddings*=kronecker"]
    assert make_experiment(ruled.configuration()) == ruled
    assert without.key() != ruled.key()
