"""Where the pieces of a transformer are: its layers, their projections, its heads, and what task it is for.

A compressed student has its teacher's module names, so one table serves both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

from torch import nn
from transformers import PreTrainedModel

from compresskit.errors import DistillError

Task = Literal[
    "sequence", "regression", "multi-label", "token", "masked-lm", "causal-lm", "question-answering", "pretraining"
]
Projection = Literal["query", "key", "value"]


@final
@dataclass(frozen=True)
class Layout:
    """Names of modules inside one layer.

    Args:
        query, key, value: the three projections; the same name three times where one module computes all of them.
        ffn: the last projection of the feed-forward network, before residual and normalisation.
        scores: whether query @ key / sqrt(head size) is all that the softmax gets besides the mask; it is not where
            positions enter by rotation.
    """

    query: str
    key: str
    value: str
    ffn: str
    scores: bool = True

    @property
    def fused(self) -> bool:
        return self.query == self.key


_BERT = Layout("attention.self.query", "attention.self.key", "attention.self.value", "output.dense")
_DISTILBERT = Layout("attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin2")
_ALBERT = Layout("attention.query", "attention.key", "attention.value", "ffn_output")
_GPT2 = Layout("attn.c_attn", "attn.c_attn", "attn.c_attn", "mlp.c_proj")
_LLAMA = Layout("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj", scores=False)
LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
}
"""By `model_type`. Hidden states and embeddings need no layout: they work wherever the layers can be found."""
_DECODERS = ("gpt2", "llama", "mistral", "qwen2")
"""Model types that always are decoders."""

_TASKS: Mapping[str, Task] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForQuestionAnswering": "question-answering",
    "BertForPreTraining": "pretraining",
}


@final
@dataclass(frozen=True)
class Anatomy:
    """What the engine knows of a model.

    Args:
        model: a transformers model, with or without a head, compressed or not.
        role: `teacher` or `student`, for messages.
    """

    model: PreTrainedModel
    role: str

    def __post_init__(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise DistillError(f"the {self.role} is a {type(self.model).__name__}, not a transformers model")

    @property
    def kind(self) -> str:
        return str(self.model.config.model_type)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return bool(getattr(self.model.config, "is_decoder", False)) or self.kind in _DECODERS

    @cached_property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layer that computes hidden state i; one module stands here several times where layers are shared.

        Raises:
            DistillError: there is no one list of layers in the model.
        """
        base = self.model.base_model
        if self.kind == "albert":
            groups, depth = base.encoder.albert_layer_groups, self.num_layers
            if any(len(group.albert_layers) != 1 for group in groups):
                raise DistillError(f"the {self.role} has several layers in one ALBERT group, which is not supported")
            return tuple(groups[int(i / (depth / len(groups)))].albert_layers[0] for i in range(depth))
        lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_layers]
        stacks = [m for m in lists if type(m[0]).__name__.endswith(("Layer", "Block"))]
        if len(stacks) != 1:
            raise DistillError(
                f"the {self.role} ({type(self.model).__name__}) has {len(stacks)} lists of {self.num_layers} layers, "
                "so it is not clear which are meant; encoders and decoder-only models have one"
            )
        return tuple(stacks[0])

    @property
    def layout(self) -> Layout:
        """Names inside a layer.

        Raises:
            DistillError: the model's type is not in the table.
        """
        if self.kind not in LAYOUTS:
            raise DistillError(
                f"where the {self.role} has queries, keys, values and FFN outputs is not known for its model type "
                f"{self.kind!r}. Known: {', '.join(LAYOUTS)}. Hidden states, embeddings and logits work for it"
            )
        return LAYOUTS[self.kind]

    def check_scores(self) -> None:
        """Raise DistillError unless attention scores are query @ key / sqrt(head size)."""
        config = self.model.config
        plain_gpt2 = getattr(config, "scale_attn_weights", True) and not getattr(
            config, "scale_attn_by_inverse_layer_idx", False
        )
        if not self.layout.scores or not plain_gpt2:
            known = ", ".join(name for name, layout in LAYOUTS.items() if layout.scores)
            raise DistillError(
                f"attention scores cannot be built from the queries and keys of the {self.role}, whose model type is "
                f"{self.kind!r}: it rotates or scales them in its own way. They can for {known}; or use relations of "
                "values, hidden states or logits, as the preset svd-hidden-kd does"
            )

    def num_heads(self, projection: Projection) -> int:
        """Heads of the queries, keys or values."""
        config = self.model.config
        grouped = getattr(config, "num_key_value_heads", None)
        return int(config.num_attention_heads if projection == "query" or grouped is None else grouped)

    @property
    def num_labels(self) -> int:
        return int(self.model.config.num_labels)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @cached_property
    def task(self) -> Task | None:
        """What the model's head is for; None if it has none."""
        name = type(self.model).__name__
        tasks = [task for suffix, task in _TASKS.items() if name.endswith(suffix)]
        if not tasks:
            return None
        if tasks[0] != "sequence":
            return tasks[0]
        if self.model.config.problem_type == "multi_label_classification":
            return "multi-label"
        return "regression" if self.num_labels == 1 else "sequence"

    def head(self) -> Task:
        """The task.

        Raises:
            DistillError: the model has no head, or one that is not known.
        """
        if self.task is None:
            raise DistillError(
                f"the {self.role} ({type(self.model).__name__}) has no head whose logits are known; models called "
                f"...{', ...'.join(_TASKS)} have one"
            )
        return self.task
