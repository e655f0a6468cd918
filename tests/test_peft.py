"""LoRA on the factors of a compressed model: PEFT finds them because they are `nn.Linear` children."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

import compresskit

FACTORS = {"svd": ("left", "right"), "kronecker": ("wide",)}


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("method", FACTORS)
def test_lora_trains_on_factors_and_merges(model: BertModel, method: str) -> None:
    report = compresskit.compress(model, method, ratio=1.3, include="encoder.*")
    layers = sum(site.name.endswith(".value") for site in report.sites)
    assert layers, "the budget left every value layer dense: nothing to test"
    ids = torch.arange(12).view(2, 6)
    before = model(ids).last_hidden_state.detach()
    targets = rf".*\.value\.({'|'.join(FACTORS[method])})"
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets, r=2, init_lora_weights=True))
    torch.testing.assert_close(adapted(ids).last_hidden_state, before)  # LoRA starts as the identity
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == layers * 2 * len(FACTORS[method])  # (A, B) on each factor
    adapted.train()
    direction = torch.randn_like(before)
    for _ in range(2):  # the first step only moves B: A's gradient is zero while B is
        (adapted(ids).last_hidden_state * direction).sum().backward()
        with torch.no_grad():
            for parameter in trained.values():
                assert parameter.grad is not None
                parameter -= parameter.grad / (parameter.grad.norm() + 1e-9)
                parameter.grad = None
    adapted.eval()
    after = adapted(ids).last_hidden_state.detach()
    assert (after - before).abs().max() > 1e-4, "the adapter is bypassed"
    torch.testing.assert_close(adapted.merge_and_unload()(ids).last_hidden_state, after, rtol=1e-4, atol=1e-5)
