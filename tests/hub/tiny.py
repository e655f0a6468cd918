"""Tiny random models of several families, compressed by hand."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresskit.core.decomposition import Decomposition, module_from
from compresskit.decompositions.svd import SVD
from compresskit.hub import mark_compressed
from compresskit.surgery.layout import swap_
from compresskit.surgery.sites import find_sites, site_weight

IDS = torch.arange(3, 15).view(2, 6)


def bert_config(**changes: Any) -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=32, **changes)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied: bool) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def marian() -> Any:
    """Three embeddings and a head that are one, and tied names that are set on the instance."""
    config = transformers.MarianConfig(
        vocab_size=96,
        decoder_vocab_size=96,
        pad_token_id=1,
        eos_token_id=0,
        decoder_start_token_id=1,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.MarianMTModel(config)


def vit() -> Any:
    """Its modules have other names in files than in memory."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
    )
    return transformers.ViTForImageClassification(config)


def dinov2() -> Any:
    """transformers fuses two of its matrices in files."""
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        use_swiglu_ffn=True,
    )
    return transformers.Dinov2Model(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(bert_config()),
    "bert-mlm": lambda: transformers.BertForMaskedLM(bert_config()),
    "bert-mlm-untied": lambda: transformers.BertForMaskedLM(bert_config(tie_word_embeddings=False)),
    "bert-classifier": lambda: transformers.BertForSequenceClassification(bert_config()),
    "gpt2": gpt2,
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "t5": t5,
    "marian": marian,
    "vit": vit,
    "dinov2": dinov2,
}


def dense(name: str, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def compress_(model: Any, decomposition: Decomposition | None = None, *, ratio: float = 2.0) -> Any:
    """Factorise every site that has a structure this small, mark the model, and return it."""
    modules: dict[str, nn.Module] = {}
    for site in find_sites(model).sites:
        fitted = (decomposition or SVD()).fit(site_weight(model, site), ratio=ratio)
        factors = {name: nn.Parameter(tensor) for name, tensor in fitted.factors.items()}
        modules |= {n: module_from(fitted.structure, factors, model.get_submodule(n)) for n in site.names}
    swap_(model, modules)
    mark_compressed(model, {"ratio": ratio})
    return model


def compressed(name: str, decomposition: Decomposition | None = None) -> Any:
    return compress_(dense(name), decomposition)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """The model's first output for fixed inputs, on parameters in fresh memory.

    Files are mapped, not copied, and matrix products differ in the last bit with the alignment of their operands;
    dense models show the same.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model = model.eval()
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).to(model.dtype))[0]
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS)[0]
    return model(input_ids=IDS)[0]


def assert_same_tensors(model: Any, other: Any) -> None:
    """Bit for bit, names included."""
    state, others = model.state_dict(), other.state_dict()
    assert list(state) == list(others)
    torch.testing.assert_close(others, state, rtol=0, atol=0)
