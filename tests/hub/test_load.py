"""Opening models for compression: what is complete opens, all else is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compresskit.errors import CheckpointError
from compresskit.hub import load_model, read_map, resolve, source
from tests.hub.tiny import assert_same_tensors, compressed, dense, outputs


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop(folder: Path, part: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense("bert-mlm").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["bert-mlm", "bert-classifier", "t5"])
def test_the_class_that_the_config_names(name: str, tmp_path: Path) -> None:
    for number, model in enumerate((dense(name), compressed(name))):
        model.save_pretrained(tmp_path / str(number))
        again = load_model(tmp_path / str(number))
        assert type(again) is type(model)
        assert not again.training
        assert_same_tensors(model, again)


def test_the_bare_model_where_it_names_none(folder: Path) -> None:
    edit_config(folder, architectures=None)
    drop(folder, "cls.")
    again = load_model(folder)
    assert type(again) is transformers.BertModel
    torch.testing.assert_close(outputs(again), outputs(dense("bert-mlm").bert), rtol=0, atol=0)


def test_a_dtype(folder: Path) -> None:
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(folder, dtype="auto").dtype == load_model(folder).dtype == torch.float32


def test_a_missing_pooler_is_left_out(tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path)
    drop(tmp_path, "pooler")
    again = load_model(tmp_path)
    assert again.pooler is None
    torch.testing.assert_close(outputs(again), outputs(dense("bert")), rtol=0, atol=0)
    drop(tmp_path, "layer.1.output.dense.bias")
    with pytest.raises(CheckpointError, match=r"BertModel: encoder.layer.1.output.dense.bias is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("part", ["pooler.dense.bias", "attention.self.query", "word_embeddings"])
def test_missing_tensors_are_refused(part: str, tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path)
    drop(tmp_path, part)
    with pytest.raises(CheckpointError, match=rf"{part}.* is missing.*transformers would fill them with random"):
        load_model(tmp_path)


def test_a_missing_head_is_refused(folder: Path) -> None:
    edit_config(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"fit BertForSequenceClassification: .*classifier.bias is missing"):
        load_model(folder)


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=97)
    with pytest.raises(CheckpointError, match=r"is \(96, 32\), not \(97, 32\)"):
        load_model(folder)


def test_no_folder_an_empty_one_and_one_without_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"empty is empty; a model folder holds config.json"):
        load_model(tmp_path / "empty")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json, so it is not a model folder"):
        load_model(folder)


@pytest.mark.parametrize(("text", "match"), [("{", "is not valid JSON"), ("[1]", "holds a JSON list, not an object")])
def test_a_config_that_is_no_config(folder: Path, text: str, match: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        load_model(folder)


def test_only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin, which can run code.*Convert it first"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        load_model(folder)


def test_damaged_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        load_model(folder)


def test_a_damaged_index_and_a_missing_shard(tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path, max_shard_size="8KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no 'weight_map'; it is damaged"):
        load_model(tmp_path)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers(dtype: torch.dtype, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"must be real floating-point numbers, but in .* {name} is (I8|C64)"):
        load_model(folder)


def test_another_quantisation(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="already quantised by gptq; give the unquantised model"):
        load_model(folder)
    assert read_map(folder) is None


def test_classes_that_transformers_does_not_have(folder: Path) -> None:
    edit_config(folder, architectures=["BertForTeaMaking"])
    with pytest.raises(CheckpointError, match=r"is a BertForTeaMaking, which transformers .* does not have"):
        load_model(folder)
    edit_config(folder, auto_map={"AutoModel": "modeling_tea.BertForTeaMaking"})
    with pytest.raises(CheckpointError, match="If you trust it, ask for it to be run: trust_remote_code=True"):
        load_model(folder)


def test_code_in_the_folder_is_run_when_it_is_trusted(folder: Path) -> None:
    edit_config(folder, architectures=["Tea"], auto_map={"AutoModel": "modeling_tea.Tea"})
    (folder / "modeling_tea.py").write_text(
        "from transformers import BertForMaskedLM\nclass Tea(BertForMaskedLM): ...\n"
    )
    again = load_model(folder, trust_remote_code=True)
    assert type(again).__name__ == "Tea"
    torch.testing.assert_close(outputs(again), outputs(dense("bert-mlm")), rtol=0, atol=0)


def test_what_transformers_refuses_is_a_checkpoint_error(folder: Path) -> None:
    edit_config(folder, architectures=None, model_type="unheard-of")
    with pytest.raises(CheckpointError, match=r"transformers cannot open .* as AutoModel: .*unheard-of"):
        load_model(folder)


def test_the_map_is_read_without_the_weights(tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = read_map(tmp_path)
    assert found is not None
    assert found.to_dict() == model.config.quantization_config.to_dict()
    assert len(found.layout()) == 16
    edit_config(tmp_path, quantization_config={**found.to_dict(), "format_version": 9})
    with pytest.raises(CheckpointError, match="newer compresskit"):
        read_map(tmp_path)


def test_resolve_takes_folders_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == Path("model")
    with pytest.raises(CheckpointError, match=r"is a folder; a revision \(v2\) belongs to a hub id"):
        resolve(folder, "v2")
    with pytest.raises(CheckpointError, match=r"config.json is a file; give the folder"):
        resolve(folder / "config.json")


def test_resolve_suggests_folders_that_are_spelt_alike(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*modle; did you mean .*model\?"):
        resolve(folder.with_name("modle"))


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub's words\nand more of them")
    return error


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (
            "RepositoryNotFoundError",
            r"'owner/modle' is neither a folder nor a model on the hub.*did you mean owner/model\?",
        ),
        ("GatedRepoError", "'owner/modle' on the hub is gated"),
        ("RevisionNotFoundError", "'owner/modle' on the hub has no revision 'v2'"),
        ("LocalEntryNotFoundError", "could not be asked for it; did you mean owner/model.*said: the hub's words$"),
        ("OfflineModeIsEnabled", "could not be asked for it"),
        ("HfHubHTTPError", "could not be asked for it"),
    ],
)
def test_resolve_says_why_the_hub_did_not_help(
    kind: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def fail(*args: Any, **options: Any) -> str:
        raise http_error(getattr(huggingface_hub.errors, kind))

    monkeypatch.setattr(source, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=match):
        resolve("owner/modle", "v2")


def test_resolve_asks_the_hub_for_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert resolve("owner/model", "abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/model", "abc")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.pt"} & set(asked["allow_patterns"])


def test_resolve_offline_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'owner/model' is not a folder, and the hub could not be asked for it"):
        resolve("owner/model")


@pytest.mark.parametrize("name", ["owner/model/more", "./here", "~/there", "/nowhere/at/all", "owner/model/"])
def test_resolve_takes_paths_for_paths(name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(name)


def test_resolve_refuses_what_is_no_hub_id() -> None:
    with pytest.raises(CheckpointError, match="'what is this' is neither a folder nor a model on the hub"):
        resolve("what is this")
