"""Writes the golden checkpoint of the current format version: python -m tests.golden.make

A tiny random masked-LM BERT, its layers factorised in turn by every decomposition of this release, embeddings and head
tied, with its outputs for a few words. Made once per format version, and never again: releases to come must open it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compresskit.core.decomposition import Decomposition, module_from
from compresskit.core.registry import decompositions
from compresskit.decompositions.kronecker import Kronecker
from compresskit.hub import FORMAT_VERSION, mark_compressed
from compresskit.surgery.layout import swap_
from compresskit.surgery.sites import find_sites, site_weight
from tests.hub.tiny import IDS, dense, outputs


def golden_model() -> Any:
    model = dense("bert-mlm")
    methods: list[Decomposition] = [method() for method in decompositions().values()]
    methods.append(Kronecker(terms=2, small="right"))
    modules: dict[str, nn.Module] = {}
    for number, site in enumerate(find_sites(model).sites):
        fitted = methods[number % len(methods)].fit(site_weight(model, site), ratio=2)
        factors = {name: nn.Parameter(tensor) for name, tensor in fitted.factors.items()}
        modules |= {name: module_from(fitted.structure, factors, model.get_submodule(name)) for name in site.names}
    swap_(model, modules)
    mark_compressed(model, {"made_by": "tests/golden/make.py"})
    return model


def main() -> None:
    folder = Path(__file__).with_name(f"format_v{FORMAT_VERSION}")
    if folder.exists():
        raise SystemExit(f"{folder} exists; golden checkpoints are not made again")
    model = golden_model()
    model.save_pretrained(folder)
    save_file({"input_ids": IDS, "logits": outputs(model)}, folder / "expected.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
