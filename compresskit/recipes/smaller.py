"""Dense students that are smaller: fewer layers, and a hidden size that makes the whole model as small as was asked.

Source: TinyBERT (Jiao et al., Findings of EMNLP 2020), section 4.1: 4 layers of 312 for 12 of 768, as many heads.
"""

import copy
import math
from typing import Any

import torch

from compresskit.errors import BudgetError, OptionError
from compresskit.surgery.sites import count_params

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


def smaller_config(model: Any, *, layer_step: int, ratio: float | None, params: int | None) -> Any:
    """The config of the widest model with one layer for every `layer_step` of `model` that is small enough.

    Heads stay as many, so that attention can be compared head by head; the FFN keeps its width relative to the hidden
    size.

    Raises:
        OptionError: the layers do not divide, or the config is of a kind that has other sizes.
        BudgetError: even the narrowest model is too large.
    """
    config = model.config
    missing = [name for name in SIZES if not hasattr(config, name)]
    if missing:
        raise OptionError(f"a smaller {type(model).__name__} cannot be made: its config has no {', '.join(missing)}")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if layers % layer_step:
        raise OptionError(f"{layers} layers are no multiple of layer_step {layer_step}; say another one")
    dense = count_params(model)
    budget = params if params is not None else math.floor(dense / (ratio or 1.0))
    made = [_narrowed(config, layers // layer_step, heads * size) for size in range(1, config.hidden_size // heads + 1)]
    low, high = 0, len(made)  # parameters rise with the width
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _count(model, made[middle]) <= budget else (low, middle)
    if low == 0:
        least = _count(model, made[0])
        raise BudgetError(
            f"{budget:,} parameters are too few: with {layers // layer_step} layers of {heads} heads the narrowest "
            f"model has {least:,}, a ratio of {dense / least:.1f}"
        )
    return made[low - 1]


def _narrowed(config: Any, layers: int, hidden: int) -> Any:
    made = copy.deepcopy(config)
    made.num_hidden_layers, made.hidden_size = layers, hidden
    made.intermediate_size = max(round(config.intermediate_size * hidden / config.hidden_size), 1)
    return made


def _count(model: Any, config: Any) -> int:
    """Parameters of a model of this class and config; a pooler that `model` lacks is not counted."""
    with torch.device("meta"):
        return count_params(_without_pooler(type(model)(config), model))


def _without_pooler(student: Any, like: Any) -> Any:
    if hasattr(student.base_model, "pooler") and getattr(like.base_model, "pooler", None) is None:
        student.base_model.pooler = None
    return student


@torch.no_grad()
def start_at_(student: Any, teacher: Any) -> Any:
    """The student with the teacher's embeddings along their principal axes; all else as it is. Changes the student.

    A linear map from the student's size to the teacher's then has nearly the right embedding to begin with.
    """
    _without_pooler(student, teacher)
    words = teacher.get_input_embeddings().weight.double()
    axes = torch.linalg.eigh(words.T @ words).eigenvectors[:, -student.config.hidden_size :]  # (teacher's, student's)
    theirs = {name: m for name, m in teacher.base_model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, module in student.base_model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name in theirs:
            module.weight.copy_(theirs[name].weight.double() @ axes)
    return student.eval()
