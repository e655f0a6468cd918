"""A whole compressed model leaves Python: torch.export with dynamic batch and length, torch.compile as one graph."""

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

from compresskit.core.registry import decomposition, decompositions
from compresskit.surgery.layout import swap_
from compresskit.surgery.sites import find_sites, site_weight
from tests.hub.tiny import IDS, bert_config

METHODS = [name for name in decompositions() if not decomposition(name, {}).alone()]
"""Those with structures of their own: modules of one that chooses are modules of these."""
OTHER_IDS = torch.arange(80).view(4, 20)
"""Another batch and another length than the program was traced with; padding (0) among them."""


class Hidden(nn.Module):
    """The last hidden state of a masked BERT as a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def compressed_bert(name):
    torch.manual_seed(0)
    config = bert_config()
    config.num_hidden_layers = 1  # a second one is traced and compiled like the first
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    sites = find_sites(model).sites
    method = decomposition(name, {})
    modules = {
        path: method.fit(site_weight(model, site), ratio=2).to_module(model.get_submodule(path))
        for site in sites
        for path in site.names
    }
    assert len(modules) > 6  # its layers, and embeddings
    swap_(model, modules)
    return Hidden(model)


@pytest.mark.parametrize("name", METHODS)
def test_a_compressed_bert_exports_with_dynamic_batch_and_length(name):
    model = compressed_bert(name)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=32)}
    program = torch.export.export(model, (IDS, torch.ones_like(IDS)), dynamic_shapes=(sizes, sizes)).module()
    for ids in (IDS, OTHER_IDS):
        mask = ids.ne(0).long()
        torch.testing.assert_close(program(ids, mask), model(ids, mask))


@pytest.mark.parametrize("name", METHODS)
def test_a_compressed_bert_compiles_as_one_graph(name):
    model = compressed_bert(name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in (IDS, OTHER_IDS):
        torch.testing.assert_close(compiled(ids, ids.ne(0).long()), model(ids, ids.ne(0).long()))
    torch.compiler.reset()


def test_the_default_compiler_takes_an_embedding_and_a_layer(tmp_path, monkeypatch):
    """Slow: generated code goes through a C++ compiler. One cut tensor train takes every kind of product."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    table = nn.Embedding(96, 36, padding_idx=0)
    words = decomposition("kronecker", {}).fit(table.weight, ratio=2).to_module(table)
    linear = nn.Linear(36, 24)
    layer = decomposition("tensor-train", {"ranks": "2x3x2"}).fit(linear.weight, ratio=2).to_module(linear)
    model = nn.Sequential(words, layer)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IDS), model(IDS))
    torch.compiler.reset()
