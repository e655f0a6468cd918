"""Models that are damaged, of another kind, or compressed already: explained, and nothing is touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Cli, Fails

QUERY = "encoder.layer.0.attention.self.query"
WEIGHT = f"{QUERY}.weight"
Damage = Callable[[Path], object]


def config(change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return damage


def map_of(change: Callable[[Any], object]) -> Damage:
    return config(lambda data: change(data["quantization_config"]))


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = WEIGHT) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def put(value: float) -> Damage:
    return tensor(lambda weight: weight.index_fill(0, torch.tensor([3]), value))


def weights(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def shards(folder: Path) -> list[Path]:
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50kB")
    return sorted(folder.glob("*.safetensors"))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "NaN": (put(float("nan")), f"the weight of '{QUERY}' holds 48 NaN and 0 infinite values"),
    "infinity": (put(float("inf")), f"the weight of '{QUERY}' holds 0 NaN and 48 infinite values"),
    "integers": (tensor(torch.Tensor.int), rf"must be real floating-point numbers, but in bert {WEIGHT} is I32\. If"),
    "booleans": (tensor(torch.Tensor.bool), f"must be real floating-point numbers, but in bert {WEIGHT} is BOOL"),
    "complex": (tensor(lambda w: w.to(torch.complex64)), f"real floating-point numbers, but in bert {WEIGHT} is C64"),
    "empty": (empty, "bert is empty; a model folder holds config.json and model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "bert has no config.json, so it is not a model folder"),
    "no JSON": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        "config.json is not valid JSON: Expecting",
    ),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not valid JSON: 'utf-8' codec"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a JSON list, not an object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "bert has no model.safetensors and no model.safet"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "bert has no model.safetensors, only pytorch_model.bin, which can run code when it is opened. Convert it first",
    ),
    "cut short": (
        weights(lambda b: b[:-100]),
        "model.safetensors is damaged or cut short .* download or copy it again",
    ),
    "cut in the header": (weights(lambda b: b[:100]), "model.safetensors is damaged or cut short"),
    "corrupted header": (weights(lambda b: b[:8] + b"\xff" * 32 + b[40:]), "model.safetensors is damaged or cut short"),
    "corrupted size": (weights(lambda b: b"\xff" * 8 + b[8:]), "model.safetensors is damaged or cut short"),
    "no bytes": (weights(lambda b: b""), "model.safetensors is damaged or cut short"),
    "missing shard": (
        lambda f: shards(f)[1].unlink(),
        "model-00002-of-0000..safetensors is missing; the checkpoint is",
    ),
    "missing tensor": (tensor(lambda w: w, f"{QUERY}.bias"), ""),
    "other sizes": (
        config(lambda c: c.update(intermediate_size=32)),
        "the weights in bert do not fit BertModel: .* not",
    ),
    "other class": (config(lambda c: c.update(architectures=["Brt"])), "bert is a Brt, which transformers .* does not"),
    "odd config": (config(lambda c: c.update(hidden_size="big")), "cannot open bert as BertModel: .*'hidden_size'"),
    "quantised": (
        config(lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        "bert is already quantised by gptq; give the unquantised model",
    ),
}


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[WEIGHT]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES["missing tensor"] = (drop, f"the weights in bert do not fit BertModel: {WEIGHT} is missing")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused(name: str, work: Path, fails: Fails) -> None:
    damage, match = DAMAGES[name]
    damage(work / "bert")
    arguments = ["-m", "svd", "--ratio", "4"]
    fails("compress", "bert", *arguments, "-o", "small", "--force", match=match)
    fails("plan", "bert", *arguments, "-o", "plan.json", match=match)


def test_integers_that_are_no_weights_do_no_harm(cli: Cli, work: Path) -> None:
    tensors = load_file(work / "bert" / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(40)[None]  # older checkpoints have it
    save_file(tensors, work / "bert" / "model.safetensors", metadata={"format": "pt"})
    assert cli("compress", "bert", "-m", "svd", "--ratio", "4").status == 0


NEWER = "written by a newer compresskit: it has format version 2, this release reads up to 1. Upgrade: pip install"


def rename(sites: Any, new: str) -> None:
    sites[new] = sites.pop(QUERY)


MAPS: dict[str, tuple[Damage, str]] = {
    "no map": (map_of(lambda q: q.pop("sites")), "has no map: 'sites' is None, not an object of module names"),
    "newer": (map_of(lambda q: q.update(format_version=2)), NEWER),
    "no version": (map_of(lambda q: q.update(format_version="1")), "is 1 or more, this one says '1'"),
    "other rank": (
        map_of(lambda q: q["sites"][QUERY]["structure"].update(rank=7)),
        rf"does not fit the weights: {QUERY}.left is \(48, \d+\), not \(48, 7\); {QUERY}.right is .* from one save",
    ),
    "other layer": (map_of(lambda q: rename(q["sites"], "encoder.query")), "encoder.query.left is missing"),
    "a layer less": (map_of(lambda q: q["sites"].pop(QUERY)), f"does not fit the weights: {QUERY} is not in the map"),
    "unknown structure": (map_of(lambda q: q["sites"][QUERY]["structure"].update(kind="?")), "unknown structure kind"),
    "insane size": (map_of(lambda q: q["sites"][QUERY]["structure"].update(rank=10**12)), "the size 'rank' of a struc"),
    "odd provenance": (map_of(lambda q: q.update(provenance=["me"])), r"'provenance' in .* is \['me'\], not an object"),
    "cut short": (weights(lambda b: b[:-100]), "model.safetensors is damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "small has no model.safetensors and no"),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_damaged_compressed_checkpoint_is_refused(name: str, work: Path, fails: Fails) -> None:
    damage, match = MAPS[name]
    damage(work / "small")
    fails("inspect", "small", match=match)
    fails("inspect", "small", "--json", match=match)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_compressed_model_is_not_compressed_again(command: str, work: Path, fails: Fails) -> None:
    arguments = [command, "small", "-m", "svd", "--ratio", "2", "-o", "again"]
    fails(*arguments, match="small is compressed already; start from the original model")
    map_of(lambda q: q.update(format_version=2))(work / "small")
    fails(*arguments, match=NEWER)


def test_a_dense_model_is_nothing_to_inspect(fails: Fails) -> None:
    fails("inspect", "bert", match="^Error: bert is a model, but not one that compresskit compressed$")
