"""Opening a model with the head of a task, which may be new, while everything below it must be complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from compresskit.errors import CheckpointError
from compresskit.hub.files import tensor_shapes
from compresskit.hub.load import read_config, weight_files
from compresskit.hub.names import Model


def load_with_head(
    folder: str | Path,
    auto_class: Any,
    *,
    changes: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    new_head: bool = False,
) -> tuple[Model, list[str]]:
    """The model in a folder, dense or compressed, as `auto_class` opens it, in eval mode; and the names of new tensors.

    Args:
        auto_class: such as `AutoModelForSequenceClassification`.
        changes: of the config: labels, dropout.
        dtype: None or "auto": as the checkpoint says.
        new_head: tensors outside the base model, and a pooler, may be missing or of another shape: they are made
            from torch's generator. Otherwise they, too, have to be there.

    Raises:
        CheckpointError: no such folder, damaged, no head, or an encoder with missing tensors.
    """
    folder = Path(folder)
    read_config(folder)
    tensor_shapes(weight_files(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **(changes or {}))
        model, info = auto_class.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"transformers cannot open {folder} as {auto_class.__name__}: {error}") from error
    made = {name: f"{name} is missing" for name in info["missing_keys"]}
    made |= {name: f"{name} is {tuple(a)}, not {tuple(b)}" for name, a, b in info["mismatched_keys"]}
    wrong = [text for name, text in made.items() if not (new_head and _is_head(model, name))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        cure = "" if new_head else ". Train a head first: compresskit finetune"
        raise CheckpointError(
            f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}{cure}"
        )
    return model.eval(), sorted(made)


def _is_head(model: Model, name: str) -> bool:
    """Whether a tensor lies outside the base model, or in its pooler."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")
