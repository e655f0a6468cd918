"""Opening a model from a folder, dense or compressed, and refusing what cannot be trusted to be complete."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from compresskit.errors import CheckpointError
from compresskit.hub.config import QUANT_METHOD, CompresskitConfig, check_format
from compresskit.hub.files import tensor_shapes, unreal_tensors
from compresskit.hub.names import Model, reader

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")


def load_model(folder: str | Path, dtype: str | torch.dtype | None = None, *, trust_remote_code: bool = False) -> Model:
    """The model in a folder, as the class that its config names (the bare AutoModel if it names none), in eval mode.

    Tensors that the files lack are an error, where transformers would make them up. One exception: a pooler that is
    missing altogether from a model that can do without (sentence encoders often lack it) is left out of the model.

    Args:
        dtype: None or "auto": as the checkpoint says.
        trust_remote_code: run the Python files of the folder, if the config asks for it.

    Raises:
        CheckpointError: no config, no safetensors, damaged files, missing tensors, integers or complex numbers for
            weights, another quantisation, a class that transformers does not have.
    """
    folder = Path(folder)
    config = read_config(folder)
    block = config.get("quantization_config")
    if block is not None and _quant_method(block) != QUANT_METHOD:
        raise CheckpointError(f"{folder} is already quantised by {_quant_method(block)}; give the unquantised model")
    files = weight_files(folder)
    tensor_shapes(files)
    cls = _model_class(folder, config, trust_remote_code=trust_remote_code)
    try:
        model, info = cls.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"transformers cannot open {folder} as {cls.__name__}: {error}") from error
    _check_complete(model, folder, info)
    _check_real(model, files)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: no folder, an empty one, no config.json, or one that is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty; a model folder holds {CONFIG} and {WEIGHTS}")
    return _read_json(folder / CONFIG)


def read_map(folder: str | Path) -> CompresskitConfig | None:
    """What a compressed checkpoint says of itself, None for any other model; the weights are not opened.

    Raises:
        CheckpointError: no readable config, or a newer format version.
    """
    block = read_config(Path(folder)).get("quantization_config")
    if not isinstance(block, dict) or _quant_method(block) != QUANT_METHOD:
        return None
    check_format(block.get("format_version"))
    config: CompresskitConfig = CompresskitConfig.from_dict(block)
    return config


def tensor_names(folder: str | Path) -> list[str]:
    """Names of the tensors in a model folder, as stored; the weights are not read.

    Raises:
        CheckpointError: no such folder, or damaged files.
    """
    read_config(Path(folder))
    return sorted(tensor_shapes(weight_files(Path(folder))))


def _quant_method(block: Any) -> Any:
    return block.get("quant_method") if isinstance(block, dict) else block


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, from the index if it is sharded; they need not exist.

    Raises:
        CheckpointError: there are none; says so if there are pickles instead.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / INDEX} has no 'weight_map'; it is damaged")
        return [folder / name for name in sorted({Path(str(name)).name for name in shards.values()})]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}, only {', '.join(pickles[:3])}, which can run code when it is opened. Convert "
            "it first: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}; the model is not complete")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a model folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return data


def _model_class(folder: Path, config: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """The class that the config names first, or AutoModel."""
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModel
    cls = getattr(transformers, names[0], None)
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return cls
    own = next((ref for ref in (config.get("auto_map") or {}).values() if str(ref).endswith(f".{names[0]}")), None)
    if own is None:
        raise CheckpointError(f"{folder} is a {names[0]}, which transformers {transformers.__version__} does not have")
    if not trust_remote_code:
        raise CheckpointError(
            f"{folder} is a {names[0]}, whose Python code is in the folder. If you trust it, ask for it to be run: "
            "trust_remote_code=True"
        )
    return get_class_from_dynamic_module(own, folder)


def _check_complete(model: Model, folder: Path, info: dict[str, Any]) -> None:
    """Raise CheckpointError if transformers made up a tensor; leave out a pooler that is not there."""
    wrong = [f"{name} is {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    missing = set(info["missing_keys"])
    pooler = {name for name, _ in model.base_model.named_parameters(prefix=_prefix(model)) if ".pooler." in f".{name}"}
    if pooler and pooler <= missing and "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.base_model.pooler = None
        missing -= pooler
    wrong += [f"{name} is missing" for name in sorted(missing)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}. transformers "
            "would fill them with random numbers"
        )


def _check_real(model: Model, files: list[Path]) -> None:
    """Raise CheckpointError where transformers has turned integers or complex numbers into real weights."""
    unreal = unreal_tensors(files)
    if unreal:
        read, weights = reader(model), {name for name, p in model.named_parameters() if p.is_floating_point()}
        wrong = [f"{name} is {kind}" for name, kind in unreal.items() if read(name) in weights]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"weights must be real floating-point numbers, but in {files[0].parent} {'; '.join(wrong[:3])}{more}. "
                "If they were quantised, give the unquantised model"
            )


def _prefix(model: Model) -> str:
    return "" if model.base_model is model else str(model.base_model_prefix)
