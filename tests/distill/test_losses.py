"""Every loss: what it is on plain data, that padding never counts, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from compresskit.distill import Loss, Objective, losses, make_loss, register
from compresskit.distill.anatomy import Anatomy
from compresskit.distill.measures import divergence, soft_cross_entropy
from compresskit.distill.objective import bind
from compresskit.errors import DistillError, OptionError, UnknownNameError
from tests.distill.tiny import FAMILIES, TASKS, collate, compressed, evaluate, examples, family, model, objective

INSIDE = (
    *("embeddings", "hidden-states", "ffn-outputs", "sentence-embeddings"),
    *("attention-scores", "attention-maps", "relations"),
)
WITH_LABELS = {task: ["task", "logits"] + ["next-sentence"] * (task == "pretraining") for task in TASKS}
VARIANTS = [
    ("attention-maps", {"kind": "mse"}),
    ("relations", {"of": "query", "heads": 2}),
    ("relations", {"of": "key"}),
    ("hidden-states", {"projection": "linear"}),
    ("sentence-embeddings", {"kind": "mse"}),
]


def pairs(count=5):
    teacher = model()
    return teacher, compressed(teacher), examples(count=count)


def test_each_file_is_one_loss():
    assert set(losses()) == {*INSIDE, "logits", "task", "next-sentence"}


@pytest.mark.parametrize("name", INSIDE)
def test_zero_for_equal_models_and_not_for_others(name):
    teacher, student, rows = pairs()
    same = evaluate(objective(name), teacher, model(), collate(rows))
    torch.testing.assert_close(same.total, torch.tensor(0.0), rtol=0, atol=1e-9)
    other = evaluate(objective(name), teacher, student, collate(rows))
    assert float(other.total.detach()) > 1e-6
    other.total.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in INSIDE), *VARIANTS])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(name, options, left):
    teacher, student, rows = pairs()
    goal = Objective(make_loss(name, options))
    tight = evaluate(goal, teacher, student, with_positions(collate(rows, left=left)))
    wide = evaluate(goal, teacher, student, with_positions(collate(rows, length=17, left=left)))
    torch.testing.assert_close(wide.total, tight.total, rtol=1e-6, atol=1e-6)


def with_positions(batch):
    """Absolute positions of the real tokens, so that padding on the left does not shift them."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize(
    ("task", "kind"), [(task, kind) for task in TASKS for kind in ("kl", "cross-entropy", "mse", "auto")]
)
def test_padding_changes_no_head(task, kind):
    if task == "regression" and kind in ("kl", "cross-entropy"):
        with pytest.raises(DistillError, match=f"regression has no probabilities for {kind}"):
            evaluate(Objective(make_loss("logits", {"kind": kind})), model(task), model(task, seed=1), {})
        return
    teacher, rows = model(task), examples(task, count=5)
    student = model(task, seed=1)
    goal = Objective(make_loss("logits", {"kind": kind, "temperature": 2.0}), *map(make_loss, WITH_LABELS[task]))
    tight = evaluate(goal, teacher, student, collate(rows))
    wide = evaluate(goal, teacher, student, collate(rows, length=17))
    torch.testing.assert_close(wide.terms, tight.terms, rtol=1e-6, atol=1e-6)
    assert all(float(value) > 0 for value in tight.terms.values())


@pytest.mark.parametrize("name", INSIDE)
def test_a_batch_is_the_mean_of_its_examples_by_unit(name):
    """What is added up over examples of equal length is their mean, so no unit is counted twice or left out."""
    teacher, student, rows = pairs()
    rows = [{"input_ids": row["input_ids"][:3]} for row in rows]
    together = evaluate(objective(name), teacher, student, collate(rows)).total
    alone = [evaluate(objective(name), teacher, student, collate([row])).total for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-9)


def test_hidden_states_are_those_of_transformers():
    teacher, student, rows = pairs()
    batch = collate([{"input_ids": row["input_ids"][:3]} for row in rows])
    ours, theirs = (m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher))
    expected = sum(F.mse_loss(s, t) for s, t in zip(ours[1:], theirs[1:], strict=True))
    torch.testing.assert_close(evaluate(objective("hidden-states"), teacher, student, batch).total, expected)
    torch.testing.assert_close(
        evaluate(objective("embeddings"), teacher, student, batch).total, F.mse_loss(ours[0], theirs[0])
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "albert", "gpt2"])
def test_attention_maps_are_those_of_transformers(kind):
    """Captured queries and keys under SDPA give what eager attention returns, padding and causal masks included."""
    batch = collate(examples(count=3))
    teacher, student = family(kind), family(kind, seed=1)
    total = evaluate(Objective(make_loss("attention-maps")), teacher, student, batch).total
    maps = []
    for one in (teacher, student):
        one.set_attn_implementation("eager")
        maps.append(one(**batch, output_attentions=True).attentions)
    expected = torch.tensor(0.0)
    for theirs, ours in zip(*maps, strict=True):
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            p, q = theirs[row, :, :length, :length], ours[row, :, :length, :length]
            terms = torch.where(p > 0, p * ((p + 1e-30).log() - (q + 1e-30).log()), torch.zeros(()))
            expected = expected + terms.sum() / p.shape[0]
    torch.testing.assert_close(total, expected / batch["attention_mask"].sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind):
    """What can be compared in each family; a clear error for the rest."""
    batch = collate(examples(count=3))
    teacher, student = family(kind), family(kind, seed=1)
    for name in ("embeddings", "hidden-states", "ffn-outputs", "relations"):
        assert float(evaluate(objective(name), teacher, student, batch).total.detach()) > 0
    if kind == "llama":
        with pytest.raises(DistillError, match="cannot be built from the queries and keys of the student"):
            evaluate(objective("attention-scores"), teacher, student, batch)
    else:
        assert float(evaluate(objective("attention-scores"), teacher, student, batch).total.detach()) > 0


@pytest.mark.parametrize("task", ["sequence", "regression", "multi-label", "token", "masked-lm", "causal-lm"])
def test_the_task_is_the_loss_of_transformers(task):
    student, batch = model(task, seed=1), collate(examples(task, count=4))
    loss = evaluate(objective("task"), model(task), student, batch).total
    torch.testing.assert_close(loss, student(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("task", "none"), [("sequence", -100), ("regression", -math.inf)])
def test_examples_without_a_label_add_nothing_to_the_task(task, none):
    student, batch = model(task, seed=1), collate(examples(task, count=4))
    some = {name: value[:3] for name, value in batch.items()}
    whole = evaluate(objective("task"), model(task), student, some).total
    batch["labels"][3] = none
    part = evaluate(objective("task"), model(task), student, batch).total
    torch.testing.assert_close(part, whole * 3 / 4, rtol=1e-5, atol=1e-6)
    part.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_labels_of_tokens_are_not_shifted_in_a_decoder():
    import transformers

    sizes = {"vocab_size": 120, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 3}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    teacher, student = (transformers.GPT2ForTokenClassification(config).eval() for _ in range(2))
    batch = collate(examples("token", count=4))
    loss = evaluate(objective("task"), teacher, student, batch).total
    torch.testing.assert_close(loss, student(**batch).loss, rtol=1e-5, atol=1e-6)


def test_question_answering_is_the_loss_of_transformers_without_padding():
    task = "question-answering"
    rows = [row for row in examples(task, count=40) if len(row["input_ids"]) == 8]
    student, batch = model(task, seed=1), collate(rows)
    loss = evaluate(objective("task"), model(task), student, batch).total
    torch.testing.assert_close(loss, student(**batch).loss, rtol=1e-5, atol=1e-6)


def test_pretraining_is_both_losses_of_transformers():
    student, batch = model("pretraining", seed=1), collate(examples("pretraining", count=6))
    loss = evaluate(objective("task", "next-sentence"), model("pretraining"), student, batch).total
    torch.testing.assert_close(loss, student(**batch).loss, rtol=1e-5, atol=1e-6)


@given(st.floats(0.5, 8))
def test_temperature_keeps_the_gradient(temperature):
    """KL and cross-entropy have one gradient: T (softmax(s / T) - softmax(t / T))."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 7, generator=generator)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    for measure in (divergence, soft_cross_entropy):
        logits = student.clone().requires_grad_()
        measure(logits, teacher, temperature=temperature).backward()
        torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-5)


def test_labelled_places_only():
    teacher, student = model("masked-lm"), model("masked-lm", seed=1)
    batch = collate(examples("masked-lm", count=4))
    places = batch["labels"] != -100
    logits = [m(**{k: v for k, v in batch.items() if k != "labels"}).logits[places] for m in (student, teacher)]
    expected = F.kl_div(logits[0].log_softmax(-1), logits[1].log_softmax(-1), reduction="batchmean", log_target=True)
    goal = Objective(make_loss("logits", {"places": "labelled"}))
    torch.testing.assert_close(evaluate(goal, teacher, student, batch).total, expected)


def test_layers_of_a_shallow_and_narrow_student():
    teacher, batch = model(), collate(examples(count=4))
    student = model(num_hidden_layers=2, hidden_size=32, seed=1)
    goal = Objective(make_loss("hidden-states", {"projection": "linear"}))
    found = evaluate(goal, teacher, student, batch).total
    torch.manual_seed(3)
    projection = torch.nn.Linear(32, 48, bias=False)
    ours, theirs = (m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    expected = sum(F.mse_loss(projection(ours[s][mask]), theirs[t][mask]) for s, t in ((1, 2), (2, 4)))
    torch.testing.assert_close(found, expected)
    named = Objective(make_loss("hidden-states", {"projection": "linear", "layers": [0, -1], "teacher_layers": [1, 3]}))
    torch.testing.assert_close(evaluate(named, teacher, student, batch).total, expected)


@pytest.mark.parametrize(
    ("loss", "teacher", "student", "message"),
    [
        (("hidden-states", {}), {}, {"hidden_size": 32}, "hidden size is 32, the teacher's 48; projection=linear"),
        (("attention-scores", {}), {}, {"num_attention_heads": 2}, "has 2 heads and the teacher 4"),
        (("relations", {}), {}, {"num_attention_heads": 2}, r"\[2, 4\] heads; say heads=..."),
        (("relations", {"heads": 5}), {}, {}, "48 values of the student's value have no 5 equal parts"),
        (("hidden-states", {}), {}, {"num_hidden_layers": 3}, "3 layers and the teacher 4, which is no multiple"),
        (("hidden-states", {"layers": [4]}), {}, {}, "layer 4 of the student, which has 4 layers"),
        (("hidden-states", {"layers": [0], "teacher_layers": [0, 1]}), {}, {}, "do not pair up"),
        (("hidden-states", {}), {}, {"vocab_size": 90}, "knows 90 words and the teacher 120"),
        (("logits", {}), {}, {}, r"the student \(BertModel\) has no head"),
        (("task", {}), {}, {}, r"the student \(BertModel\) has no head"),
    ],
)
def test_mismatches_are_named(loss, teacher, student, message):
    with pytest.raises(DistillError, match=message):
        bind(Objective(make_loss(*loss)), Anatomy(model(**student), "student"), Anatomy(model(**teacher), "teacher"))


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (model("sequence"), model("sequence", num_labels=5), "the student has 5 labels, the teacher 3"),
        (model("masked-lm"), model("masked-lm", vocab_size=90), "the student has 90 words, the teacher 120"),
        (model("token"), model("sequence"), "the student's head is for sequence, the teacher's for token"),
        (model(), torch.nn.Linear(2, 2), "the student is a Linear, not a transformers model"),
    ],
)
def test_heads_that_do_not_fit_are_named(teacher, student, message):
    with pytest.raises(DistillError, match=message):
        bind(objective("logits"), Anatomy(student, "student"), Anatomy(teacher, "teacher"))


def test_shared_parameters_are_refused():
    teacher = model()
    student = model(seed=1)
    student.embeddings = teacher.embeddings
    with pytest.raises(DistillError, match="share 5 parameters"):
        bind(objective("hidden-states"), Anatomy(student, "student"), Anatomy(teacher, "teacher"))


def test_unknown_layers_are_refused():
    import transformers

    sizes = {"vocab_size": 120, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(DistillError, match="has 2 lists of 2 layers"):
        _ = Anatomy(t5, "teacher").layers
    with pytest.raises(DistillError, match="not known for its model type 't5'"):
        _ = Anatomy(t5, "teacher").layout


def test_labels_out_of_range_are_named():
    teacher, batch = model("sequence"), collate(examples("sequence", count=4))
    batch["labels"][0] = 3
    with pytest.raises(DistillError, match=r"labels go from \d to 3, the student has 3 classes"):
        evaluate(objective("task"), teacher, model("sequence", seed=1), batch)
    del batch["labels"]
    with pytest.raises(DistillError, match="needs 'labels'; the batch has input_ids"):
        evaluate(objective("task"), teacher, model("sequence", seed=1), batch)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("hidden-state", {}, UnknownNameError, "did you mean 'hidden-states'"),
        ("hidden-states", {"layer": [0]}, UnknownNameError, "has no option 'layer'; its options: weight"),
        ("hidden-states", {"weight": 0}, OptionError, "positive number, got 0"),
        ("hidden-states", {"weight": math.nan}, OptionError, "positive number, got nan"),
        ("logits", {"temperature": -1}, OptionError, "temperature of logits is a positive number"),
        ("logits", {"kind": "huber"}, OptionError, "auto or kl or cross-entropy or mse, got 'huber'"),
    ],
)
def test_wrong_options_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        make_loss(name, options)


def test_what_is_no_loss_cannot_be_registered():
    with pytest.raises(OptionError, match="is not a subclass of Loss"):
        register(int)
    with pytest.raises(OptionError, match="it lacks comparisons"):
        register(type("Half", (Loss,), {"name": "half"}))
