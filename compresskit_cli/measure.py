"""Measuring encoders side by side: `python -m compresskit_cli.measure DENSE COMPRESSED...` prints JSON.

It runs in a process of its own, so that what it opens is only what is on disk. The models are timed in turn,
round by round: a machine that slows down slows all of them.
"""

import json
import statistics
import sys
import time
from importlib.resources import files
from typing import Any

import scipy.stats
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import compresskit  # noqa: F401 - teaches AutoModel to open compressed checkpoints
from compresskit_cli.loading import quiet_transformers

BATCH, LENGTH = 8, 128
ROUNDS = 15


def main(folders: list[str]) -> None:
    """Print what `measure` returns."""
    sys.stdout.write(json.dumps(measure(folders)) + "\n")


def measure(folders: list[str]) -> list[dict[str, Any]]:
    """For each folder: parameters, forward time relative to the first, agreement of embeddings with the first."""
    quiet_transformers()
    sentences = files("compresskit_cli").joinpath("sentences.txt").read_text("utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    models = [AutoModel.from_pretrained(folder).eval() for folder in folders]
    embeddings = [_embed(model, batch) for model in models]
    times = _forward_times(models)
    return [
        {
            "folder": folder,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "time_ratio": times[0] / time_s,
            "time_s": time_s,
            "cosine": float((embedding * embeddings[0]).sum(-1).mean()),
            "similarity_rank_correlation": _rank_correlation(embedding, embeddings[0]),
        }
        for folder, model, embedding, time_s in zip(folders, models, embeddings, times, strict=True)
    ]


@torch.no_grad()
def _embed(model: nn.Module, batch: Any) -> Tensor:
    """Mean of the token vectors, padding left out, scaled to length 1: (sentences, dim)."""
    hidden = model(**batch).last_hidden_state  # (sentences, time, dim)
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _rank_correlation(embedding: Tensor, reference: Tensor) -> float:
    """Spearman correlation between the similarities of all pairs of sentences."""
    pairs = torch.triu_indices(len(embedding), len(embedding), offset=1)
    mine, theirs = ((e @ e.T)[pairs[0], pairs[1]].numpy() for e in (embedding, reference))
    return float(scipy.stats.spearmanr(mine, theirs).statistic)


@torch.no_grad()
def _forward_times(models: list[Any]) -> list[float]:
    """Median time in seconds of a forward pass of each model, measured in turn."""
    ids = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS + 2):
        for record, model in zip(times, models, strict=True):
            start = time.perf_counter()
            model(input_ids=ids)
            record.append(time.perf_counter() - start)
    return [statistics.median(record[2:]) for record in times]


if __name__ == "__main__":
    main(sys.argv[1:])
