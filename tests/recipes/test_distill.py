"""What a distillation does besides training: stages that are left out, own students, resuming, and what it refuses."""

import math
import shutil

import pytest
import torch
import transformers

import compresskit
import compresskit.recipes as recipes
import compresskit.tasks as tasks
from compresskit.core import native_build
from compresskit.errors import CheckpointError, DataError, DistillError, OptionError, TrainingError
from compresskit.recipes.stages import SaveByClock
from compresskit.tasks import Processes, custom_task, find_task
from tests.recipes.conftest import VOCAB, config, save
from tests.recipes.test_end_to_end import short

SST2, STS = find_task("sst2"), find_task("sts")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_features_alone_are_distilled_without_a_task(encoder, reviews, text, tmp_path):
    """The best checkpoint of the corpus stage is the one that orders pairs of sentences best."""
    notes = []
    result = recipes.distill(
        short("kroneckerbert:k8").with_values({"corpus.eval_steps": 1}),
        encoder,
        tmp_path / "run",
        task=STS,
        data=reviews,
        corpus=text,
        on_note=notes.append,
    )
    (stage,) = result.stages
    assert [step for step, _ in stage.curve] == [1, 2, 3]
    assert stage.best_step == max(stage.curve, key=lambda entry: entry[1]["spearman"])[0]
    assert result.metrics == stage.metrics
    assert set(result.before) == set(result.teacher) == {"spearman", "pearson"}
    assert type(result.student).__name__ == "BertModel"
    assert "loss_task" not in stage.loss  # no head to guess words with
    assert any("stage 2 is left out" in note for note in notes)


def test_a_language_model_keeps_its_head_and_is_scored_by_its_words(base, text, tmp_path):
    (tmp_path / "dev.txt").write_text("we saw a good film . the film was very bad .\nwho is in paris ?\n" * 3)
    result = recipes.distill(
        short("svd-kd").with_values({"corpus.eval_steps": 1, "corpus.lr": 1e-2}),
        base,
        tmp_path / "run",
        task=find_task("perplexity"),
        data=tmp_path / "dev.txt",
        corpus=text,
        ratio=1.5,
    )
    (stage,) = result.stages
    assert stage.best_step == max(stage.curve, key=lambda entry: entry[1]["log_likelihood"])[0]
    assert type(result.student).__name__ == "BertForPreTraining"
    assert result.metrics == stage.metrics
    assert result.metrics["perplexity"] > 1
    assert "loss_task" in stage.loss


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": len(VOCAB)}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": len(VOCAB)}


@pytest.mark.parametrize(
    ("kind", "sizes", "preset"), [("gpt2", GPT2, "svd-balanced-kd"), ("llama", LLAMA, "svd-hidden-kd")]
)
def test_a_decoder_learns_the_next_words(kind, sizes, preset, text, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, initializer_range=0.2, **sizes)
    save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "teacher")
    (tmp_path / "dev.txt").write_text("john saw mary in paris . we saw rome .\n" * 8)
    result = recipes.distill(
        short(preset).with_values({"corpus.max_steps": 40, "corpus.lr": 1e-2, "corpus.eval_steps": 20}),
        tmp_path / "teacher",
        tmp_path / "run",
        task=find_task("perplexity"),
        data=tmp_path / "dev.txt",
        corpus=text,
        ratio=1.5,
    )
    assert type(result.student).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert "loss_task" in result.stages[0].loss
    assert result.metrics["perplexity"] < 0.7 * min(result.before["perplexity"], result.teacher["perplexity"])


def test_without_any_task_the_last_step_is_taken(encoder, text, tmp_path):
    result = recipes.distill(short("svd-kd"), encoder, tmp_path / "run", corpus=text, ratio=2)
    assert (result.metrics, result.stages[0].best_step) == ({}, 3)
    assert result.ratio >= 2


@pytest.mark.parametrize("stages", ["corpus", "both", "task"])
def test_a_student_is_fitted_to_what_its_layers_see(stages, teacher, base, encoder, reviews, text, tmp_path):
    """Hardly trained, it answers more like the dense model if its start was fitted to texts."""
    errors = []
    dense = transformers.AutoModel.from_pretrained(base if stages == "both" else encoder).eval()
    if stages == "task":
        dense = transformers.AutoModel.from_pretrained(teacher).eval()
    for texts in (0, 64):
        values = {f"{s}.lr": 1e-30 for s in ("corpus", "task")} | {"compress.calibration": texts}
        result = recipes.distill(
            short("svd-kd").with_values(values),
            encoder if stages == "corpus" else teacher,
            tmp_path / str(texts),
            task=None if stages == "corpus" else SST2,
            data=reviews,
            corpus=None if stages == "task" else text,
            base=base if stages == "both" else None,
            ratio=2,
        )
        inputs = result.tokenizer(["we saw a good film", "the film was very bad ."], return_tensors="pt", padding=True)
        with torch.no_grad():
            ours, theirs = (m(**inputs).last_hidden_state for m in (result.student.base_model, dense))
        errors.append(float((ours - theirs)[inputs["attention_mask"].bool()].square().mean()))
        assert result.ratio >= 2
    assert errors[1] < 0.8 * errors[0]


def test_a_stage_stops_when_its_scores_stay_below_the_best(teacher, reviews, tmp_path):
    values = {"task.lr": 1e-30, "task.max_steps": 20, "task.eval_steps": 1, "task.patience": 2}
    preset = short("svd-kd").with_values(values)  # nothing changes, so the first score stays the best
    result = recipes.distill(preset, teacher, tmp_path / "run", task=SST2, data=reviews, ratio=2)
    (stage,) = result.stages
    assert (stage.steps, stage.best_step, len(stage.curve)) == (3, 1, 3)
    assert result.metrics == stage.metrics == stage.curve[0][1]


@pytest.mark.parametrize("task", [SST2, find_task("stsb")], ids=lambda task: task.name)
def test_altered_copies_are_learnt_from_the_teacher_alone(task, teacher, base, reviews, tmp_path):
    if task.kind == "regression":
        torch.manual_seed(1)
        teacher = save(tasks.model_for(task, base, new_head=True), tmp_path / "teacher")
    preset = recipes.preset("svd-kd").with_values({"task.epochs": 1, "task.batch_size": 4, "task.device": "cpu"})
    runs = []
    for number in (3, 0):
        changed, folder = preset.with_values({"task.altered_copies": number}), tmp_path / str(number)
        runs += recipes.distill(changed, teacher, folder, task=task, data=reviews, ratio=2).stages
    copies, none = runs
    assert copies.steps == 4 * none.steps
    assert all(math.isfinite(value) for value in copies.loss.values())
    assert copies.loss["loss_task"] < 0.5 * none.loss["loss_task"]  # three quarters have no label


def test_without_a_corpus_stage_1_is_left_out_and_said(teacher, reviews, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    result = recipes.distill(
        short("kroneckerbert:k8"), teacher, tmp_path / "run", task=SST2, data=reviews, on_note=notes.append
    )
    assert [stage.name for stage in result.stages] == ["task"]
    assert any("one-stage ablation" in note for note in notes)
    assert sum("compresskit kernels --build" in note for note in notes) == (native_build.compiler() is not None)
    assert sum("--bf16" in note for note in notes) == 1


def test_without_a_base_the_student_goes_on_in_stage_2(teacher, reviews, text, tmp_path):
    result = recipes.distill(short("kroneckerbert:k8"), teacher, tmp_path / "run", task=SST2, data=reviews, corpus=text)
    assert [stage.name for stage in result.stages] == ["corpus", "task"]
    assert "loss_task" not in result.stages[0].loss


def test_a_student_of_one_s_own_keeps_its_shape_and_gets_the_teacher_s_head(teacher, base, reviews, tmp_path):
    student = transformers.BertModel.from_pretrained(base)
    compresskit.compress(student, "svd", ratio=2, include="*layer*")
    save(student, tmp_path / "student")
    settings = {"task.lr": 1e-30, "task.weight_decay": 0, "task.max_steps": 1}
    preset = short("kroneckerbert:k8").with_values(settings)
    result = recipes.distill(preset, teacher, tmp_path / "run", task=SST2, data=reviews, student=tmp_path / "student")
    layout = compresskit.layout_of(result.student)
    assert {name.removeprefix("bert."): entry.structure for name, entry in layout.items()} == {
        name: entry.structure for name, entry in compresskit.layout_of(student).items()
    }
    head = transformers.BertForSequenceClassification.from_pretrained(teacher).classifier.weight
    torch.testing.assert_close(result.student.classifier.weight, head)
    with pytest.raises(OptionError, match="a student of your own has its size"):
        recipes.distill(preset, teacher, tmp_path / "x", task=SST2, data=reviews, student=tmp_path / "student", ratio=2)


class _KilledError(Exception):
    pass


def _kill_at(stage, step):
    def on_progress(name, progress):
        if (name, progress.step) == (stage, step):
            raise _KilledError

    return on_progress


@pytest.mark.parametrize(("stage", "step"), [("corpus", 3), ("task", 2)])
def test_a_killed_distillation_resumes_to_the_same_bits(stage, step, teacher, base, reviews, text, tmp_path):
    steps = {"corpus.max_steps": 4, "task.max_steps": 4, "corpus.eval_steps": 2, "task.eval_steps": 1}
    preset = short("kroneckerbert:k8").with_values(steps)
    given = {"task": SST2, "data": reviews, "corpus": text, "base": base, "cache": tmp_path / "cache"}
    whole = recipes.distill(preset, teacher, tmp_path / "whole", **given)
    with pytest.raises(_KilledError):
        recipes.distill(preset, teacher, tmp_path / "run", **given, on_progress=_kill_at(stage, step))
    with pytest.raises(TrainingError, match="holds an interrupted run; resume it, or discard it"):
        recipes.distill(preset, teacher, tmp_path / "run", **given)
    other = preset.with_values({"task.lr": 0.5})
    with pytest.raises(TrainingError, match=r"the run in .* was another one: preset: .*lr"):
        recipes.distill(other, teacher, tmp_path / "run", **given, resume=True)
    resumed = recipes.distill(preset, teacher, tmp_path / "run", **given, resume=True)
    torch.testing.assert_close(weights(resumed.student), weights(whole.student), rtol=0, atol=0)
    assert resumed.metrics == whole.metrics
    assert [s.curve for s in resumed.stages] == [s.curve for s in whole.stages]
    assert (resumed.before, resumed.teacher) == (whole.before, whole.teacher)


def test_the_teacher_s_answers_are_found_again(teacher, reviews, tmp_path):
    given = {"task": SST2, "data": reviews, "cache": tmp_path / "cache", "cache_teacher": True}
    preset = short("kroneckerbert:k8").with_values({"task.max_steps": 6})
    first = recipes.distill(preset, teacher, tmp_path / "a", **given)
    assert list((tmp_path / "cache" / "teacher").rglob("*.safetensors"))
    second = recipes.distill(preset, teacher, tmp_path / "b", **given)
    torch.testing.assert_close(weights(first.student), weights(second.student), rtol=0, atol=0)
    with pytest.warns(UserWarning, match="limited to 5,000 bytes and keeps the answers of 0 examples"):
        third = recipes.distill(preset, teacher, tmp_path / "c", **given | {"cache": None}, cache_bytes=5000)
    torch.testing.assert_close(weights(first.student), weights(third.student), rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_trained(teacher, base, encoder, reviews, text, tmp_path):
    preset = short("kroneckerbert:k8")

    def refuse(error, match, *, which=preset, by=teacher, **given):
        with pytest.raises(error, match=match):
            recipes.distill(which, by, tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()

    refuse(OptionError, "nothing to train on: give a corpus")
    refuse(OptionError, "cache_bytes limits what cache_teacher keeps", task=SST2, data=reviews, cache_bytes=5000)
    refuse(OptionError, "nothing to train on", task=STS, data=reviews)
    decomposed = short("matrix-decomposition")
    refuse(OptionError, "matrix-decomposition has no stage on plain text", which=decomposed, corpus=text)
    refuse(DataError, "has 3 labels .*, the model 2", task=find_task("mnli"), data=reviews)
    refuse(DataError, "the model calls its labels negative, positive", task=find_task("mrpc"), data=reviews)
    refuse(DataError, "is a regression with one output, the model has 2", task=find_task("stsb"), data=reviews)
    refuse(
        CheckpointError, r"classifier.*Train a head first: compresskit finetune", by=encoder, task=SST2, data=reviews
    )
    refuse(DataError, "there is no split 'train' of sst2", task=SST2, data=text)
    refuse(DataError, "no column 'body'", task=custom_task("classification", ("body",)), data=reviews / "SST-2")
    refuse(DataError, r"there is no \*\.txt in", task=SST2, data=reviews, corpus=reviews)
    refuse(DataError, "there is no file or folder .*nowhere", task=SST2, data=reviews, corpus=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("\n\na\n")
    refuse(DataError, "holds no text of at least 8 tokens", task=SST2, data=reviews, corpus=tmp_path / "empty")


def test_models_of_other_tokenizers_are_refused(teacher, reviews, text, tmp_path):
    other = save(transformers.BertForMaskedLM(config()), tmp_path / "other")
    shutil.rmtree(other)
    transformers.BertForMaskedLM(config()).save_pretrained(other)
    swapped = {word: i for i, word in enumerate((*VOCAB[:5], VOCAB[6], VOCAB[5], *VOCAB[7:]))}
    transformers.BertTokenizer(vocab=swapped, model_max_length=64).save_pretrained(other)
    given = {"task": SST2, "data": reviews, "corpus": text}
    with pytest.raises(DistillError, match=r"the tokenizer of the pre-trained model, .* 'good' is number 6, there 5"):
        recipes.distill(short("kroneckerbert:k8"), teacher, tmp_path / "run", base=other, **given)
    with pytest.raises(DistillError, match=r"the tokenizer of the student, .* is not that of the teacher"):
        recipes.distill(short("kroneckerbert:k8"), teacher, tmp_path / "run", student=other, **given)
    small = transformers.BertModel(config(vocab_size=20))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(DistillError, match="knows 20 words, the teacher 28; they need the same tokenizer"):
        recipes.distill(short("kroneckerbert:k8"), teacher, tmp_path / "run", student=tmp_path / "small", **given)


def test_a_compressed_teacher_makes_no_student(teacher, reviews, tmp_path):
    model = transformers.BertForSequenceClassification.from_pretrained(teacher)
    compresskit.compress(model, "svd", ratio=1.5)
    save(model, tmp_path / "cut")
    with pytest.raises(CheckpointError, match="is compressed; a student is made of a dense teacher"):
        recipes.distill(short("kroneckerbert:k8"), tmp_path / "cut", tmp_path / "run", task=SST2, data=reviews)


def test_checkpoints_are_kept_by_the_clock():
    control = transformers.TrainerControl()
    SaveByClock(1000.0).on_step_end(None, None, control)
    assert not control.should_save
    callback = SaveByClock(-1.0)
    callback.on_step_end(None, None, control)
    assert control.should_save


def test_several_processes_do_not_share_a_teachers_cache(teacher, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "alone", False)
    given = {"task": SST2, "data": reviews, "cache_teacher": True}
    with pytest.raises(DistillError, match="several processes cannot share the teacher's answers"):
        recipes.distill(short("kroneckerbert:k8"), teacher, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
