"""Presets as files: what they say of bert-base, that they can be printed, edited and passed back, what is refused."""

import re

import pytest
import torch
import transformers

import compresskit
import compresskit.recipes as recipes
from compresskit.errors import BudgetError, CompresskitError, OptionError, StructureError, UnknownNameError
from compresskit.recipes.smaller import smaller_config
from tests.models import remember_analyses
from tests.recipes.conftest import config

PADDING = 768
"""The exact padding row that stays beside the factors; the papers approximate it like any other."""


@pytest.fixture(scope="module")
def bert_base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig())
    for layer in model.encoder.layer[1:]:
        layer.load_state_dict(model.encoder.layer[0].state_dict())
    with pytest.MonkeyPatch.context() as patch:
        remember_analyses(patch, compresskit.SVD, compresskit.Kronecker)
        yield model


def planned(name, model):
    return recipes.compression_plan(recipes.preset(name), model)


def test_k8_has_the_parameters_of_the_paper_with_either_pooler(bert_base):
    assert planned("kroneckerbert:k8", bert_base).params_after == 14_211_852 + PADDING
    assert planned("kroneckerbert:k8", bert_base).ratio == pytest.approx(7.70, abs=0.005)
    without = recipes.preset("kroneckerbert:k8")
    rules = [rule for rule in without.data["compress"]["rules"] if "pooler" not in rule["pattern"]]
    dense = recipes.compression_plan(without.with_values({"compress.rules": rules}), bert_base)
    assert dense.params_after == 14_654_216 + PADDING


def test_k21_has_the_parameters_of_the_paper(bert_base):
    found = planned("kroneckerbert:k21", bert_base)
    assert found.params_after == 5_228_272 + PADDING
    attention = next(p for p in found.sites if p.site.name.endswith("0.attention.self.query"))
    assert (attention.structure.left, attention.structure.right) == ((384, 48), (2, 16))
    output = next(p for p in found.sites if p.site.name.endswith("0.output.dense"))
    assert (output.structure.left, output.structure.right) == ((2, 16), (384, 192))


def test_k19_is_at_most_two_percent_above_19(bert_base):
    assert 19 <= planned("kroneckerbert:k19", bert_base).ratio <= 1.02 * 19


def test_matrix_decomposition_has_the_parameters_of_the_paper(bert_base):
    found = planned("matrix-decomposition", bert_base)
    assert found.params_after == pytest.approx(65_190_000, abs=5_000)
    assert {p.structure.rank for p in found.sites} == {245}


def test_ranks_scale_with_the_hidden_size():
    model = transformers.BertModel(config(hidden_size=96, num_hidden_layers=1))
    assert {p.structure.rank for p in planned("matrix-decomposition", model).sites} == {30}  # 245 * 96 // 768


def test_a_small_dense_bert_is_as_small_as_asked(bert_base):
    found = smaller_config(bert_base, layer_step=3, ratio=7.7, params=None)
    assert (found.num_hidden_layers, found.hidden_size, found.intermediate_size) == (4, 300, 1200)
    assert found.num_attention_heads == 12
    with torch.device("meta"):
        params = sum(p.numel() for p in transformers.BertModel(found).parameters())
    assert 7.7 <= 109_482_240 / params <= 8.1
    with pytest.raises(BudgetError, match=r"1,000 parameters are too few: .* the narrowest model has"):
        smaller_config(bert_base, layer_step=3, ratio=None, params=1000)
    with pytest.raises(OptionError, match="12 layers are no multiple of layer_step 5"):
        smaller_config(bert_base, layer_step=5, ratio=7.7, params=None)


@pytest.mark.parametrize("name", recipes.presets())
def test_a_preset_is_printed_edited_and_passed_back(name, tmp_path):
    path = tmp_path / "my.toml"
    text = recipes.preset_text(name)
    path.write_text(text)
    assert "# " in text
    assert recipes.preset(path) == recipes.preset(name)
    path.write_text(re.sub(r"^lr = .*$", "lr = 0.125", text, flags=re.MULTILINE))
    assert recipes.preset(path).task.settings.lr == 0.125
    path.write_text(recipes.preset(name).to_toml())
    assert recipes.preset(path) == recipes.preset(name)


@pytest.mark.parametrize("name", recipes.presets())
def test_every_preset_cites_its_source_and_says_what_is_ours(name):
    found = recipes.preset(name)
    assert found.summary
    assert re.search(r"\b(19|20)\d\d\b", found.source), "no year"
    assert re.search(r"\bours\b", recipes.preset_text(name))


def test_values_are_changed_by_name_also_where_a_task_says_otherwise():
    found = recipes.preset("kroneckerbert:k21")
    assert found.task.for_task("rte").settings.lr == 5e-5
    assert found.task.for_task("sst2").settings.lr == 5e-4
    changed = found.with_values({"task.lr": 1e-3, "corpus.max_steps": 7}).with_texts({"corpus.schedule": "cosine"})
    assert changed.task.for_task("rte").settings.lr == 1e-3
    assert changed.task.for_task("cola").settings.epochs == 20
    assert (changed.corpus.settings.max_steps, changed.corpus.settings.schedule) == (7, "cosine")
    assert found.corpus.settings.max_steps is None


def test_an_option_of_one_loss_is_changed_by_its_name():
    found = recipes.preset("svd-kd")
    changed = found.with_texts({"corpus.loss.attention-scores.weight": "0.1"})
    assert [loss.weight for loss in changed.corpus.objective.losses] == [1, 0.1, 1]
    assert [loss.weight for loss in changed.task.for_task("rte").objective.losses] == [1] * 5
    with pytest.raises(OptionError, match=r"no loss 'atention-scores' here; did you mean 'attention-scores'\?.*hidden"):
        found.with_values({"corpus.loss.atention-scores.weight": 0.1})
    with pytest.raises(OptionError, match=r"'logits' names a loss but none of its options, as logits\.weight does"):
        found.with_values({"task.loss.logits": 0.1})
    with pytest.raises(UnknownNameError, match="wieght"):
        found.with_values({"task.loss.logits.wieght": 0.1})


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("kronekerbert", UnknownNameError, r"no preset is called 'kronekerbert'; did you mean 'kroneckerbert'\?"),
        ("kroneckerbert:k22", UnknownNameError, r"no variant 'k22'; did you mean 'k2?1'\?.*k8"),
        ("svd-kd:k8", UnknownNameError, "preset svd-kd has no variant 'k8'. Known: none"),
        ("nowhere.toml", UnknownNameError, "there is no preset file nowhere.toml"),
    ],
)
def test_an_unknown_preset_names_the_nearest(name, error, match):
    with pytest.raises(error, match=match):
        recipes.preset(name)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("lr = 1e-3", "lrr = 1e-3", r"my\.toml: corpus has no key 'lrr'; did you mean 'lr'\?"),
        ("lr = 1e-3", "lr = -1", r"my\.toml: corpus: lr is -1\.0; a number above 0 is expected"),
        ("lr = 1e-3", 'lr = "high"', r"my\.toml: corpus: option 'lr' takes number, got 'high'"),
        ("lr = 1e-3", "tasks = { rte = { lr = 1 } }", r"my\.toml: corpus has no key 'tasks'"),
        ("[task.tasks.cola]", "[[task.tasks]]", r"my\.toml: task\.tasks is a table of tables, not \["),
        ("[corpus]", "[corpuss]\n[corpus]", r"my\.toml has no key 'corpuss'; did you mean 'corpus'\?"),
        ('name = "embeddings"', 'name = "embedings"', r"my\.toml: corpus: no loss is called 'embedings'; did you"),
        ('method = "svd"', "rules = [{ pattern = 3 }]", r"my\.toml: compress\.rules: a rule is a table with a pattern"),
        ('method = "svd"', "", r"my\.toml: compress has neither rules nor a method"),
        ("[compress]", "[smaller]\n[compress]", r"one table \[compress\] or \[smaller\], this one has 2"),
        ("calibration = 0", "calibration = -1", r"my\.toml: compress: calibration is -1 texts; 0 or more are expected"),
        (
            "uniform = true",
            'budget = "texts"',
            r"my\.toml: compress: budget is 'texts'; outputs or weights is expected",
        ),
        ("uniform = true", 'machine = "cpu-b16"', r"no machine is called 'cpu-b16'; did you mean 'cpu-bf16'"),
        ("uniform = true", "tokens = 0", r"my\.toml: compress: tokens are those .* at least 1; got 0"),
        ('method = "svd"', 'method = "svd"\nmethods = "svd"', r"my\.toml: compress\.methods is a table, not 'svd'"),
        ("uniform = true", "uniform = 3", r"my\.toml: compress: option 'uniform' takes true or false, got '3'"),
        ("[task]", "[task]\naltered_copies = -1", r"my\.toml: task: altered_copies is -1; 0 or more are expected"),
        ("[task]", "[task]\naltered_share = 0.0", r"my\.toml: task: altered_share is 0\.0; a share above 0, at most 1"),
        ("[corpus]", "[corpus]\naltered_copies = 1", r"my\.toml: corpus has no key 'altered_copies'"),
        ("[compress]", "[compress", r"my\.toml is not TOML: .*line"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_key(old, new, match, tmp_path):
    text = recipes.preset_text("svd-kd")
    assert old in text
    (tmp_path / "my.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(CompresskitError, match=match):
        recipes.preset(tmp_path / "my.toml")


def test_a_preset_without_a_size_asks_for_one():
    model = transformers.BertModel(config())
    for name in ("svd-kd", "small-dense"):
        with pytest.raises(OptionError, match=f"preset {name} has no size of its own"):
            recipes.student_maker(recipes.preset(name), model)
    with pytest.raises(OptionError, match="give one of them"):
        recipes.student_maker(recipes.preset("svd-kd"), model, ratio=2, params=1000)
    with pytest.raises(UnknownNameError, match="preset matrix-decomposition has no table 'corpus'"):
        recipes.preset("matrix-decomposition").with_values({"corpus.lr": 1})


def test_shapes_that_do_not_divide_are_named():
    model = transformers.BertModel(config(hidden_size=36, num_attention_heads=2))
    with pytest.raises(
        StructureError, match=r"k8: kronecker with right = 1x8 does not divide embeddings\.word_emb.*36"
    ):
        recipes.student_maker(recipes.preset("kroneckerbert:k8"), model)


def test_a_ratio_replaces_the_shapes_of_a_variant():
    model = transformers.BertModel(config())
    found = recipes.compression_plan(recipes.preset("kroneckerbert:k8"), model, ratio=2.5)
    assert found.ratio >= 2.5
    shapes = {(p.site.rows, p.site.cols, p.site.kinds): p.structure for p in found.sites}
    assert all(p.structure == shapes[p.site.rows, p.site.cols, p.site.kinds] for p in found.sites)  # uniform


def test_some_layers_get_another_method():
    model = transformers.BertModel(config())
    found = recipes.compression_plan(recipes.preset("kronecker-svd-kd"), model, ratio=2)
    assert found.ratio >= 2
    kinds = {p.site.name.startswith("embeddings."): type(p.structure).kind for p in found.sites}
    assert kinds == {True: "low-rank", False: "kronecker"}
    edited = recipes.preset("kronecker-svd-kd").with_values({"compress.methods": {"*embeddings*": "svdd"}})
    with pytest.raises(UnknownNameError, match="'svdd'; did you mean 'svd'"):
        recipes.compression_plan(edited, model, ratio=2)


def test_a_student_is_planned_for_a_machine():
    model = transformers.BertModel(config(hidden_size=384, intermediate_size=384))
    asked = recipes.preset("kronecker-svd-kd").with_values({"compress.options": {}})
    values = {"compress.machine": "cpu-bf16-kernel", "compress.tokens": 1024}
    target = recipes.compression_plan(asked.with_values(values), model, ratio=4).target
    assert (target.machine.name, target.tokens) == ("cpu-bf16-kernel", 1024)
    with pytest.raises(BudgetError, match="no structure as fast as dense"):
        recipes.compression_plan(asked.with_values({"compress.machine": "cpu-bf16"}), model, ratio=8)


def test_a_budget_by_weights_is_that_without_texts_and_the_fits_are_to_texts():
    torch.manual_seed(0)
    model = transformers.BertModel(config())
    ids = torch.randint(config().vocab_size, (16, 12))
    moments = compresskit.calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    asked = recipes.preset("svd-kd").with_values({"compress.uniform": "false"})
    plain = {p.site.name: p.structure for p in recipes.compression_plan(asked, model, ratio=2).sites}
    found = {}
    for budget in ("outputs", "weights"):
        chosen = asked.with_values({"compress.budget": budget})
        student = recipes.student_maker(chosen, model, ratio=2, calibrate=lambda dense: moments)(model)
        found[budget] = {name: entry.structure for name, entry in compresskit.layout_of(student).items()}
        layer = student.encoder.layer[0].attention.self.query
        weight = model.encoder.layer[0].attention.self.query.weight.detach()
        best = compresskit.SVD().fit(weight, structure=layer.structure)
        assert not torch.allclose(layer.rebuilt_weight(), best.to_module().rebuilt_weight(), atol=1e-4)
    assert found["weights"] == plain != found["outputs"]


def test_one_student_under_two_heads_has_the_same_encoder_structures():
    torch.manual_seed(0)
    classifier = transformers.BertForSequenceClassification(config())
    words, bare = transformers.BertForMaskedLM(config()), transformers.BertModel(config())
    make = recipes.student_maker(recipes.preset("kroneckerbert:k8"), classifier)
    layouts = [compresskit.layout_of(make(model)) for model in (classifier, words, bare)]
    encoders = [
        {name.removeprefix("bert."): entry.structure for name, entry in layout.items() if ".layer." in name}
        for layout in layouts
    ]
    assert len(encoders[0]) == 18
    assert encoders[0] == encoders[1] == encoders[2]
    tied = make(words)
    assert tied.cls.predictions.decoder.factors()["small"] is tied.bert.embeddings.word_embeddings.factors()["small"]
