"""Saved and opened again: nothing is lost, nothing is stored twice, whatever class or process opens it."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

import compresskit
from compresskit.core.decomposition import Decomposition, module_from
from compresskit.core.modules import FactorizedModule
from compresskit.core.registry import decompositions
from compresskit.decompositions.kronecker import Kronecker
from compresskit.decompositions.svd import SVD
from compresskit.hub import mark_compressed
from compresskit.hub.tied import _pattern as tied_pattern
from compresskit.surgery import layout
from compresskit.surgery.layout import layout_of, swap_
from compresskit.surgery.sites import count_params
from tests.hub.tiny import IDS, MODELS, assert_same_tensors, compress_, compressed, dense, outputs


def keys(folder: Path) -> list[str]:
    return [key for file in sorted(folder.glob("*.safetensors")) for key in safe_open(file, "pt").keys()]  # noqa: SIM118


def reopen(model: Any, folder: Path, **options: Any) -> Any:
    """Saved, opened again as the same class, nothing missing and nothing left over."""
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return again


@pytest.mark.parametrize("method", [SVD(), Kronecker()], ids=lambda method: method.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_bit_for_bit(name: str, method: Decomposition, tmp_path: Path) -> None:
    model = compressed(name, method)
    again = reopen(model, tmp_path)
    assert_same_tensors(model, again)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    assert layout_of(again) == layout_of(model)
    assert count_params(again) == count_params(model) < count_params(dense(name))
    for kept in (model, again):
        assert not any(p.requires_grad for name, p in kept.named_parameters() if name.endswith(".padding_row"))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("name", decompositions())
def test_every_decomposition_keeps_tied_factors_tied(name: str, tmp_path: Path) -> None:
    model = compressed("bert-mlm", decompositions()[name]())
    again = reopen(model, tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    table, head = again.bert.embeddings.word_embeddings, again.cls.predictions.decoder
    assert {id(p) for p in head.factors().values()} == {id(p) for p in table.factors().values()}
    assert not any("cls.predictions.decoder." in key and not key.endswith("bias") for key in keys(tmp_path))


def test_saving_again_writes_the_same_bytes(tmp_path: Path) -> None:
    reopen(compressed("bert-mlm"), tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("name", ["bert", "bert-mlm", "bert-mlm-untied", "bert-classifier"])
def test_heads_may_be_swapped(name: str, auto: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path)
    other, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    heads = ("cls.", "classifier.", "bert.pooler.", "pooler.")
    assert all(key.startswith(heads) for key in (*info["missing_keys"], *info["unexpected_keys"])), info
    ours = model.base_model(IDS).last_hidden_state
    torch.testing.assert_close(outputs(other.base_model), ours)
    assert layout_of(other.base_model).keys() >= {k for k in layout_of(model.base_model) if "pooler" not in k}


def test_an_encoder_of_a_pair_opens_alone(tmp_path: Path) -> None:
    model = compressed("t5")
    model.save_pretrained(tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    torch.testing.assert_close(encoder(IDS)[0], model.encoder(IDS)[0])


def test_an_inner_model_saved_on_its_own_opens(tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    for number, source in enumerate((model, reopen(model, tmp_path / "whole"))):
        again = reopen(source.bert, tmp_path / str(number), add_pooling_layer=False)
        torch.testing.assert_close(outputs(again), outputs(source.bert), rtol=0, atol=0)
        assert "embeddings.word_embeddings.weight" in keys(tmp_path / str(number))  # a sentinel, as in the whole
        assert_same_tensors(source, reopen(source, tmp_path / f"{number}-whole"))  # the map is the whole model's again


@pytest.mark.parametrize("name", ["bert-mlm", "t5"])
def test_shards(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tensors(model, again)


def test_bfloat16(tmp_path: Path) -> None:
    model = compress_(dense("bert-mlm").to(torch.bfloat16))
    again = reopen(model, tmp_path)
    assert again.dtype == torch.bfloat16
    assert_same_tensors(model, again)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    assert {p.dtype for p in type(model).from_pretrained(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_loaded_model_may_be_cast_and_moved(tmp_path: Path) -> None:
    again = reopen(compressed("bert"), tmp_path)
    assert {p.dtype for p in again.half().parameters()} == {torch.float16}
    assert {p.dtype for p in again.float().to("cpu", torch.float64).parameters()} == {torch.float64}


def test_copies_are_whole(tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        again = reopen(twin, tmp_path / str(number))
        torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
        assert count_params(again) == count_params(model)
        assert again.config.quantization_config.provenance == {"ratio": 2.0}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_generate(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    again = reopen(model, tmp_path)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(again.generate(IDS, **options), model.generate(IDS, **options))


@pytest.mark.parametrize("name", MODELS)
def test_dequantize_gives_an_ordinary_model(name: str, tmp_path: Path) -> None:
    model = reopen(compressed(name), tmp_path / "small")
    expected = outputs(model)
    assert model.dequantize() is model
    assert not any(isinstance(module, FactorizedModule) for module in model.modules())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense(name).named_parameters()]
    assert model._tied_weights_keys == dense(name)._tied_weights_keys
    assert model.all_tied_weights_keys == dense(name).all_tied_weights_keys
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)
    again = reopen(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    dense(name).save_pretrained(tmp_path / "reference")
    assert keys(tmp_path / "dense") == keys(tmp_path / "reference")


def test_dequantize_takes_a_dtype() -> None:
    assert {p.dtype for p in compressed("bert").dequantize(torch.float64).parameters()} == {torch.float64}
    assert {p.dtype for p in compressed("bert").to(torch.float16).dequantize().parameters()} == {torch.float16}


@pytest.mark.parametrize("undo", [compresskit.dequantize_, layout.dequantize_], ids=["public", "surgery"])
def test_layers_made_dense_by_hand_are_saved_as_dense(undo: Callable[[Any], None], tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    undo(model)
    again = reopen(model, tmp_path)
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)


def test_a_model_made_dense_ties_its_weights_again() -> None:
    wrapper = nn.Sequential(compressed("bert-mlm"))
    compresskit.dequantize_(wrapper)
    model = wrapper[0]
    model.tie_weights()
    model.resize_token_embeddings(100)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not hasattr(model, "hf_quantizer")


def test_factors_shared_by_layers_are_stored_once(tmp_path: Path) -> None:
    model = dense("llama")  # its embeddings are not tied, and transformers then ties nothing by itself
    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    fitted = SVD().fit(model.get_submodule(layers[0]).weight, ratio=2)
    right = nn.Parameter(fitted.factors["right"])
    for name in layers:
        factors = {"left": nn.Parameter(torch.randn_like(fitted.factors["left"])), "right": right}
        swap_(model, {name: module_from(fitted.structure, factors, model.get_submodule(name))})
    mark_compressed(model)
    again = reopen(model, tmp_path)
    first, second = (again.get_submodule(name) for name in layers)
    assert first.right.weight is second.right.weight
    assert first.left.weight is not second.left.weight
    assert_same_tensors(model, again)
    assert count_params(again) == count_params(model)


def test_tied_names_are_not_taken_for_prefixes() -> None:
    """transformers reads a tied name as the beginning of an expression; a factor `core1` must not tie `core10`."""
    names = {"table.core1", "table.core10", "table.core2"}
    for name in names:
        pattern = f"^{tied_pattern(name, names)}"
        assert [other for other in sorted(names) if re.search(pattern, other)] == [name]


def test_tying_again_changes_nothing(tmp_path: Path) -> None:
    model = reopen(compressed("t5"), tmp_path)
    expected, size = outputs(model), count_params(model)
    model.tie_weights()
    assert count_params(model) == size
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=0)


def test_resizing_embeddings_is_refused_unless_it_is_no_change() -> None:
    model = compressed("bert-mlm")
    expected = outputs(model)
    model.resize_token_embeddings(96)
    with pytest.raises(TypeError, match="FactorizedEmbedding"):
        model.resize_token_embeddings(97)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=0)


def test_offloading_to_disk(tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    model.save_pretrained(tmp_path / "small")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}
    again = type(model).from_pretrained(tmp_path / "small", device_map=places, offload_folder=tmp_path / "disk")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def create_commit(self, operations: Any, **options: Any) -> None:
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    def card(name: str, tags: list[str], token: Any = None) -> ModelCard:
        return ModelCard(f"---\ntags: {json.dumps(tags)}\n---\n")

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", card)
    model = compressed("bert-mlm")
    model.push_to_hub("me/small")
    assert_same_tensors(model, transformers.AutoModelForMaskedLM.from_pretrained(tmp_path))
    assert "embeddings.word_embeddings.weight" in "".join(keys(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["compresskit"]
    assert model.dequantize().model_tags is None


def test_a_plain_model_has_nothing_to_mark() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    mark_compressed(plain)
    assert not hasattr(plain, "hf_quantizer")
    mark_compressed(untouched := dense("bert"))
    assert not hasattr(untouched, "hf_quantizer")
    assert not hasattr(untouched.config, "quantization_config")


def test_a_model_inside_another_module_is_marked(tmp_path: Path) -> None:
    wrapper = nn.Sequential(dense("bert"), nn.Identity())
    compress_(wrapper)
    again = reopen(wrapper[0], tmp_path)
    torch.testing.assert_close(outputs(again), outputs(wrapper[0]), rtol=0, atol=0)


def test_unknown_keys_of_the_config_are_kept(tmp_path: Path) -> None:
    model = compressed("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["added_later"] = {"a": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path)
    assert again.config.quantization_config.to_dict()["added_later"] == {"a": 1}
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["added_later"] == {"a": 1}


def test_opening_draws_no_random_numbers(tmp_path: Path) -> None:
    compressed("t5").save_pretrained(tmp_path)  # T5 initialises weights through their parent modules
    state = torch.random.get_rng_state()
    transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.random.get_rng_state(), state)
