"""Damaged, foreign and newer checkpoints: transformers' own from_pretrained stops with an error that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compresskit.errors import CheckpointError
from compresskit.hub import CompresskitConfig, check_unquantized, mark_compressed
from compresskit.hub.quantizer import CompresskitQuantizer, register_
from tests.hub.tiny import compressed, dense, outputs

QUERY = "bert.encoder.layer.0.attention.self.query"
TABLE = "bert.embeddings.word_embeddings"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    compressed("bert-mlm").save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config in config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, match: str, cls: Any = transformers.AutoModelForMaskedLM, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match):
        cls.from_pretrained(folder, **options)


def test_a_newer_format(folder: Path) -> None:
    edit(folder, lambda block: block.update(format_version=2, sites="of another kind"))
    refused(folder, "written by a newer compresskit: it has format version 2, this release reads up to 1")


@pytest.mark.parametrize("version", ["1", 0, None, True])
def test_a_format_that_is_no_version(folder: Path, version: Any) -> None:
    edit(folder, lambda block: block.update(format_version=version))
    refused(folder, "format_version of a compresskit checkpoint is 1 or more")


def test_no_map(folder: Path) -> None:
    edit(folder, lambda block: block.pop("sites"))
    refused(folder, "has no map: 'sites' is None")


def test_an_unknown_structure(folder: Path) -> None:
    edit(folder, lambda block: block["sites"][QUERY]["structure"].update(kind="kronecka"))
    refused(folder, "unknown structure kind 'kronecka'.*did you mean 'kronecker'")


def test_insane_sizes(folder: Path) -> None:
    edit(folder, lambda block: block["sites"][QUERY]["structure"].update(rank=10**12))
    refused(folder, "the size 'rank' of a structure is 1000000000000")


def test_a_map_for_a_model_of_another_shape(folder: Path) -> None:
    edit(folder, lambda block: block["sites"][QUERY]["structure"].update(rows=64))
    refused(folder, f"{QUERY}' is 64 x 32, the model's is 32 x 32")


def test_a_map_whose_ranks_are_not_those_of_the_files(folder: Path) -> None:
    edit(folder, lambda block: block["sites"][QUERY]["structure"].update(rank=5))
    refused(folder, rf"does not fit the weights: {QUERY}.left.weight is \(32, 8\), not \(32, 5\); {QUERY}.right")


def test_a_map_of_a_layer_that_the_model_lacks(folder: Path) -> None:
    edit(folder, lambda block: block["sites"].update({QUERY.replace("layer.0", "layer.7"): block["sites"][QUERY]}))
    refused(folder, "it names 'bert.encoder.layer.7.attention.self.query', which BertForMaskedLM")
    refused(folder, "which BertModel with this configuration does not have", transformers.AutoModel)


def test_a_map_of_another_model(folder: Path) -> None:
    def rename(block: dict[str, Any]) -> None:
        block["sites"] = {name.replace("bert.", "gpt."): entry for name, entry in block["sites"].items()}

    edit(folder, rename)
    for cls in (transformers.AutoModelForMaskedLM, transformers.AutoModel):
        refused(folder, "the map does not fit the model: it names 'cls.predictions.decoder'|it names 'gpt.em", cls)


def test_a_map_that_ties_what_cannot_be_tied(folder: Path) -> None:
    edit(folder, lambda block: block["sites"][QUERY].update(shares={"left": TABLE}))
    refused(folder, f"'{QUERY}' shares its factor 'left'|'{TABLE}', where it is")


@pytest.mark.parametrize("tensor", [f"{QUERY}.left.weight", f"{QUERY}.bias", f"{TABLE}.padding_row", f"{TABLE}.left"])
def test_a_missing_tensor(folder: Path, tensor: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(tensor))
    refused(folder, rf"does not fit the weights: {tensor} \(.*\) is missing. Both files must come from one save")


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "query" in name])
    refused(folder, "query.left.weight .* is missing; .* and 3 more")


def test_tensors_renamed_on_the_way(folder: Path) -> None:
    elsewhere = {"layer.0.attention.self.query": "layer.1.attention.self.query"}
    refused(folder, f"transformers found no tensor for {QUERY}.bias, {QUERY}.left.weight", key_mapping=elsewhere)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_short(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "model.safetensors is damaged or cut short")


def test_a_damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"x" * 100 + file.read_bytes()[108:])
    refused(folder, "model.safetensors is damaged or cut short")


def test_a_missing_shard(tmp_path: Path) -> None:
    compressed("bert-mlm").save_pretrained(tmp_path, max_shard_size="8KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, f"{lost.name} is missing")


def test_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin is not a safetensors file; compressed checkpoints are never read from pickles")


def test_sentinels_stop_who_opens_the_files_with_a_config_of_his_own(folder: Path) -> None:
    config = dense("bert-mlm").config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.BertForMaskedLM.from_pretrained(folder, config=config)


def test_a_dense_model_is_not_compressed_by_opening_it(tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="from_pretrained does not compress"):
        transformers.BertModel.from_pretrained(tmp_path, quantization_config=CompresskitConfig({}))


def test_a_model_quantised_by_others() -> None:
    model = dense("bert")
    model.hf_quantizer = object.__new__(
        type(
            "Other",
            (transformers.quantizers.HfQuantizer,),
            {"is_serializable": None, "is_trainable": None, "quantization_config": transformers.QuantoConfig()},
        )
    )
    with pytest.raises(CheckpointError, match="already quantised by quanto"):
        mark_compressed(model)
    with pytest.raises(CheckpointError, match="already quantised by quanto"):
        check_unquantized(torch.nn.Sequential(model))


def test_a_second_import_registers_again(folder: Path) -> None:
    register_()
    register_()
    again = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert isinstance(again.hf_quantizer, CompresskitQuantizer)
    torch.testing.assert_close(outputs(again), outputs(compressed("bert-mlm")), rtol=0, atol=0)
