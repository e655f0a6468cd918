"""Models for tasks, dense and compressed, and what scoring them gives."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import compresskit
import compresskit.tasks as tasks
from compresskit.errors import CheckpointError, DataError
from compresskit.tasks.metrics import predictions_of
from tests.tasks.conftest import Write, tiny_config

STS = "sentence1\tsentence2\tscore\na good film\ta very good film\t5\na bad film\tjohn lives in rome\t0.5\n"


def teacher(encoder: pathlib.Path, name: str, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tasks.model_for(tasks.find_task(name), encoder, new_head=True)


@pytest.mark.parametrize(
    ("name", "architecture", "labels"),
    [
        ("mnli", "BertForSequenceClassification", ["entailment", "neutral", "contradiction"]),
        ("stsb", "BertForSequenceClassification", ["score"]),
        ("conll2003", "BertForTokenClassification", list(tasks.find_task("conll2003").label_names)),
        ("squad", "BertForQuestionAnswering", None),
    ],
)
def test_a_new_head_fits_the_task_and_stays(
    name: str, architecture: str, labels: list[str] | None, encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = teacher(encoder, name)
    assert type(model).__name__ == architecture
    if labels is not None:
        assert [model.config.id2label[i] for i in range(model.config.num_labels)] == labels
    expected = {"mnli": "single_label_classification", "stsb": "regression"}
    assert model.config.problem_type == expected.get(name)
    model.save_pretrained(tmp_path)
    again = tasks.model_for(tasks.find_task(name), tmp_path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_head_is_drawn_from_the_seed(encoder: pathlib.Path) -> None:
    heads = [teacher(encoder, "sst2", seed=seed).classifier.weight for seed in (3, 3, 4)]
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)
    assert not torch.equal(heads[0], heads[2])


def test_what_has_no_head_or_no_encoder_is_refused(encoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.(bias|weight) is missing.*compresskit finetune"):
        tasks.model_for(tasks.find_task("sst2"), encoder)
    teacher(encoder, "sst2").save_pretrained(tmp_path / "sst2")
    with pytest.raises(CheckpointError, match="qa_outputs"):
        tasks.model_for(tasks.find_task("squad"), tmp_path / "sst2")
    with pytest.raises(DataError, match="does not name its labels"):
        tasks.model_for(tasks.custom_task("classification", ("text",)), encoder, new_head=True)
    with pytest.raises(CheckpointError, match="there is no folder"):
        tasks.model_for(tasks.find_task("sts"), tmp_path / "nowhere")
    config = json.loads((encoder / "config.json").read_text()) | {"num_hidden_layers": 3}
    weights = (encoder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"do not fit BertForSequenceClassification: .*layer\.2\."):
        tasks.model_for(tasks.find_task("sst2"), tmp_path, new_head=True)


def test_a_sentence_encoder_without_a_pooler_is_complete(encoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    transformers.BertModel(tiny_config(), add_pooling_layer=False).save_pretrained(tmp_path)
    assert tasks.model_for(tasks.find_task("sts"), tmp_path).pooler is None


def test_metrics_do_not_depend_on_batches_and_the_mode_is_restored(
    encoder: pathlib.Path, tokenizer: Any, reviews: pathlib.Path
) -> None:
    task, model = tasks.find_task("sst2"), teacher(encoder, "sst2").train()
    features = tasks.tokenized(tasks.load_task_data(task, reviews, "dev"), task, tokenizer)
    outputs = [tasks.predict(model, tokenizer, task, features, batch_size=size) for size in (1, 5, 32)]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(outputs[0], outputs[2], rtol=1e-4, atol=1e-6)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in _texts(task, reviews)]
    np.testing.assert_allclose(outputs[1], logits, rtol=1e-4, atol=1e-6)


def _texts(task: tasks.Task, folder: pathlib.Path) -> list[str]:
    return list(tasks.load_task_data(task, folder, "dev")["text"])


def test_similarity_is_the_cosine_of_mean_token_vectors(encoder: pathlib.Path, tokenizer: Any, write: Write) -> None:
    task, path = tasks.find_task("sts"), write("dev.tsv", STS)
    model = tasks.model_for(task, encoder)
    found = tasks.run_evaluation(model, tokenizer, task, path)
    with torch.no_grad():
        means = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for row in STS.splitlines()[1:]
            for text in row.split("\t")[:2]
        ]
    cosines = [float(torch.cosine_similarity(means[i], means[i + 1], dim=0)) for i in (0, 2)]
    np.testing.assert_allclose(found.predictions, cosines, rtol=1e-4)
    assert found.num_examples == 2
    assert set(found.metrics) == {"spearman", "pearson"}


@pytest.mark.parametrize("kind", ["conll2003", "squad-v2", "stsb", "sst2"])
def test_every_kind_can_be_scored(kind: str, encoder: pathlib.Path, tokenizer: Any, write: Write) -> None:
    answers = {"text": ["rome"], "answer_start": [14]}
    question = {"id": "1", "question": "where ?", "context": "john lives in rome", "answers": answers}
    files = {
        "conll2003": write("ner.txt", "john B-PER\nwalks O\n\nrome B-LOC\n"),
        "squad-v2": write("qa.jsonl", [question]),
        "stsb": write("stsb.tsv", STS),
        "sst2": write("sst2.tsv", "sentence\tlabel\ngood\t1\n"),
    }
    task = tasks.find_task(kind)
    found = tasks.evaluate(teacher(encoder, kind), tokenizer, task, files[kind])
    assert list(found)[: len(task.metrics)] == list(task.metrics)
    assert all(-1 <= value <= 1 for name, value in found.items() if name != "best_threshold")


def test_a_compressed_model_is_scored_like_its_dense_twin(
    encoder: pathlib.Path, tokenizer: Any, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    task, model = tasks.find_task("sst2"), teacher(encoder, "sst2")
    compresskit.compress(model, "svd", ratio=2)
    model.save_pretrained(tmp_path / "small")
    small = tasks.model_for(task, tmp_path / "small")
    assert any(isinstance(module, compresskit.FactorizedLinear) for module in small.modules())
    features = tasks.tokenized(tasks.load_task_data(task, reviews, "dev"), task, tokenizer)
    mine = tasks.predict(small, tokenizer, task, features)
    compresskit.dequantize_(small)
    np.testing.assert_allclose(mine, tasks.predict(small, tokenizer, task, features), rtol=1e-3, atol=1e-5)


def test_a_compressed_encoder_gets_a_new_head(encoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = tasks.model_for(tasks.find_task("sts"), encoder)
    compresskit.compress(model, "svd", ratio=2)
    model.save_pretrained(tmp_path)
    headed = tasks.model_for(tasks.find_task("mnli"), tmp_path, new_head=True)
    assert headed.classifier.weight.shape == (3, 32)
    torch.testing.assert_close(headed.bert.state_dict(), model.state_dict(), rtol=0, atol=0)


def named(*names: str) -> Any:
    return tiny_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def test_labels_follow_the_order_of_the_model(encoder: pathlib.Path, tokenizer: Any, write: Write) -> None:
    rte = tasks.find_task("rte")
    assert tasks.align_labels(rte, named("Not Entailment", "Entailment")).label_names == (
        "not_entailment",
        "entailment",
    )
    assert tasks.align_labels(rte, named("LABEL_0", "LABEL_1")) == rte
    path = write("dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tentailment\nc\td\tentailment\n")
    model = transformers.BertForSequenceClassification(named("not_entailment", "entailment"))
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([-1.0, 1.0])  # always says what the model calls entailment
    assert tasks.evaluate(model, tokenizer, rte, path) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("a", "b", "c"), r"the task rte has 2 labels \(entailment, not_entailment\), the model 3 \(a, b, c\)"),
        (("yes", "no"), r"the model calls its labels yes, no.*--label-names"),
    ],
)
def test_labels_that_do_not_fit_are_refused(names: tuple[str, ...], match: str) -> None:
    with pytest.raises(DataError, match=match):
        tasks.align_labels(tasks.find_task("rte"), named(*names))


def test_a_classifier_is_no_regression() -> None:
    with pytest.raises(DataError, match="a regression with one output, the model has 2 labels"):
        tasks.align_labels(tasks.find_task("stsb"), named("a", "b"))


def test_labels_of_a_model_serve_a_task_without_names() -> None:
    task = tasks.custom_task("classification", ("text",))
    assert tasks.align_labels(task, named("pear", "plum")).label_names == ("pear", "plum")
    assert tasks.align_labels(task, named("LABEL_0", "LABEL_1")).label_names == ("0", "1")


def test_an_output_that_is_not_finite_is_an_error(encoder: pathlib.Path, tokenizer: Any, reviews: pathlib.Path) -> None:
    model = teacher(encoder, "sst2")
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(DataError, match="NaN or infinity"):
        tasks.evaluate(model, tokenizer, tasks.find_task("sst2"), reviews)


def test_examples_can_be_given(encoder: pathlib.Path, tokenizer: Any, reviews: pathlib.Path) -> None:
    task = tasks.find_task("sst2")
    some = tasks.load_task_data(task, reviews, "dev").select([0, 3])
    found = tasks.run_evaluation(teacher(encoder, "sst2"), tokenizer, task, some)
    assert found.num_examples == len(found.predictions) == 2
    assert predictions_of(task, [np.array([0.0, 1.0])] * 2, None, some).tolist() == [1, 1]


def test_the_real_model_reaches_its_published_sts_b_score(minilm: pathlib.Path, real_data: pathlib.Path) -> None:
    """Published for all-MiniLM-L6-v2 on STS-B dev: 86.7."""
    task = tasks.find_task("sts")
    model, tokenizer = tasks.model_for(task, minilm), tasks.tokenizer_for(minilm)
    assert tasks.evaluate(model, tokenizer, task, real_data)["spearman"] == pytest.approx(0.867, abs=0.0005)
