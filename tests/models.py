"""Tiny models of every architecture family, with random weights from a fixed seed; nothing is downloaded."""

from collections.abc import Callable

import torch
import transformers
from torch import nn

VOCAB, HIDDEN, LAYERS, HEADS, FFN, POSITIONS = 120, 48, 2, 4, 96, 40


def _encoder(**more):
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": POSITIONS,
        **more,
    }


def bert_config(**more):
    return transformers.BertConfig(**_encoder(**more))


def _llama(**more):
    sizes = _encoder(num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def _mixtral():
    sizes = _encoder(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def _gpt2():
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes))


def _t5():
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 12, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes))


def _whisper():
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _WHISPER_SIDE.items()}
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        num_mel_bins=20,
        max_source_positions=16,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **sizes,
    )
    return transformers.WhisperForConditionalGeneration(config)


_WHISPER_SIDE = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FFN}


def _distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=VOCAB,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=FFN,
            max_position_embeddings=POSITIONS,
        )
    )


def _vit():
    sizes = _encoder(image_size=16, patch_size=4)
    del sizes["vocab_size"], sizes["max_position_embeddings"]
    return transformers.ViTModel(transformers.ViTConfig(**sizes))


class Plain(nn.Module):
    """No transformers model: a tied pair with a padding row, and one block that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN, padding_idx=3)
        self.first = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.ReLU(), nn.Linear(FFN, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)
        self.again = self.first
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = self.again(self.norm(self.first(x) + x))
        return {"logits": self.head(x)}


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(bert_config()),
    "bert-mlm": lambda: transformers.BertForMaskedLM(bert_config()),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(bert_config()),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_encoder())),
    "distilbert": _distilbert,
    "albert": lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**_encoder(embedding_size=24))),
    "electra": lambda: transformers.ElectraForPreTraining(transformers.ElectraConfig(**_encoder(embedding_size=24))),
    "gpt2": _gpt2,
    "t5": _t5,
    "llama": lambda: _llama(tie_word_embeddings=False),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "mixtral": _mixtral,
    "vit": _vit,
    "whisper": _whisper,
    "plain": Plain,
}
"""A builder for each family; use `build`, which fixes the seed."""

GENERATORS = ("gpt2", "t5", "llama", "llama-tied", "whisper")
"""Families that `generate`."""


def build(family: str) -> nn.Module:
    """A model of this family in evaluation mode; the same weights each time, the global generator untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[family]().eval()


def inputs(family: str) -> dict[str, torch.Tensor]:
    """Arguments of `forward`, two examples."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB, (2, 9), generator=generator)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 20, 32, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if family == "t5" else {"input_ids": ids}


def outputs(model: nn.Module, family: str) -> torch.Tensor:
    """The main output of a forward pass on `inputs(family)`."""
    result = model(**inputs(family))
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def unique_params(*modules: nn.Module) -> int:
    """Parameters, each object counted once; counted here, so that reports are compared with something else."""
    return sum({id(p): p.numel() for module in modules for _, p in module.named_parameters()}.values())


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, tuple[int, torch.Tensor]]]:
    """Which module stands where, and which parameter with which values; `assert_unchanged` compares with it."""
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return modules, {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, int], dict[str, tuple[int, torch.Tensor]]]) -> None:
    """The same objects in the same places with the same bits, NaN included."""
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert {name: key for name, (key, _) in tensors.items()} == {name: key for name, (key, _) in before[1].items()}
    for name, (_, values) in tensors.items():
        torch.testing.assert_close(values, before[1][name][1], rtol=0, atol=0, equal_nan=True, msg=name)


def remember_analyses(monkeypatch, *classes: type) -> None:
    """Analyse and price equal weights only once: plans of one model, or a model of equal layers, share the work."""
    for cls in classes:
        monkeypatch.setattr(cls, "analyse", _remembered(cls.analyse))


def _remembered(analyse):
    made = {}

    def remembered(self, weight):
        key = (self, tuple(weight.shape), weight.double().sum().item(), weight[0].double().sum().item())
        if key not in made:
            made[key] = _PricedOnce(analyse(self, weight))
        return made[key]

    return remembered


class _PricedOnce:
    """An analysis that remembers the errors that it has computed."""

    def __init__(self, analysis):
        self._analysis = analysis
        self._errors = {}
        self.factors = analysis.factors
        self.shrink = analysis.shrink

    def squared_errors(self, structures):
        unknown = [structure for structure in structures if structure not in self._errors]
        self._errors.update(zip(unknown, self._analysis.squared_errors(unknown), strict=True))
        return [self._errors[structure] for structure in structures]
