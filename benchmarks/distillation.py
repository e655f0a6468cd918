"""One step of distillation by our trainer, and the same by hand. Imports torch: import it late.

`python -m benchmarks.distillation CONFIGURATION HOW [FILE MEMORY]` takes a few steps in one way, for its peak memory,
and notes in a file how long they take.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

import compresskit
from benchmarks.embeddings import read_sentences
from benchmarks.memory import keep_memory
from benchmarks.models import load_model
from benchmarks.timing import time_call
from compresskit.distill import DistillationTrainer, Objective, make_loss

HOWS = ("nothing", "passes", "by_hand", "ours")
"""Ways of a step, see `Steps`."""


class Steps:
    """The same teacher, student and batch, and one method per way of taking a step up to the gradients.

    None of them updates the student, so that all compute the same. `ours` and `by_hand` end with the same loss where
    there is no padding; the student is in training mode in all.

    Args:
        model: of `benchmarks.models`.
        method, ratio: of the student, a compressed copy; without a method, a dense one.
        batch, tokens: size of the batch; the texts are from half as long as `tokens` to `tokens` long if `padded`.
        dropout: whether the model keeps its own.
        bf16: passes under autocast, those by hand as PyTorch does them; losses in float32.
    """

    def __init__(
        self,
        model: str,
        method: str | None,
        ratio: float,
        batch: int,
        tokens: int,
        padded: bool,
        seed: int,
        folder: str,
        bf16: bool = False,
        dropout: bool = True,
    ) -> None:
        self._autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
        self.teacher, _ = load_model(model, seed=seed, sentences=read_sentences())
        if not dropout:
            _without_dropout(self.teacher)
        self.student = copy.deepcopy(self.teacher)
        if method is not None:
            compresskit.compress(self.student, method, ratio=ratio)
        self.batch = _batch(self.teacher.config.vocab_size, batch, tokens, padded, seed)
        self.trainer = DistillationTrainer(
            self.teacher,
            self.student,
            Objective(make_loss("hidden-states"), make_loss("attention-scores")),
            TrainingArguments(folder, use_cpu=True, bf16=bf16, report_to="none", disable_tqdm=True),
        )
        self.by_hands = copy.deepcopy(self.student) if bf16 else self.student
        if bf16:  # as `train` would, which is not called: its forward pass then multiplies in bfloat16
            self.trainer.accelerator.prepare_model(self.student)

    def nothing(self) -> None:
        """No step: what loading and building alone take."""

    def passes(self) -> None:
        """Teacher forward without gradients, student forward, backward from the sum of the same features: no loss."""
        _, student = self._forward()
        torch.stack([tensor.sum() for tensor in student]).sum().backward()
        self.by_hands.zero_grad()

    def by_hand(self) -> None:
        """`passes` with the losses written out: F.mse_loss of hidden states and of scores, padding counted in."""
        teacher, student = self._forward()
        layers = self.teacher.config.num_hidden_layers
        loss = sum(F.mse_loss(s, t) for s, t in zip(student[:layers], teacher[:layers], strict=True))
        for layer in range(layers, 3 * layers, 2):
            loss = loss + F.mse_loss(self._scores(*student[layer:][:2]), self._scores(*teacher[layer:][:2]))
        loss.backward()
        self.by_hands.zero_grad()

    def ours(self) -> None:
        """What Trainer calls for one step: `get_batch_samples`, `training_step`."""
        samples, totals = self.trainer.get_batch_samples(iter([dict(self.batch)]), 1, torch.device("cpu"))
        self.trainer.training_step(self.student, samples[0], totals)
        self.student.zero_grad()

    def _forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Features of both: hidden states of all layers, then query and key of each layer."""
        with torch.no_grad(), self._autocast(), _kept(self.teacher) as theirs:
            self.teacher.eval()(**self.batch)
        with self._autocast(), _kept(self.by_hands) as ours:
            self.by_hands.train()(**self.batch)
        return [tensor.float() for tensor in theirs], [tensor.float() for tensor in ours]

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        heads = self.teacher.config.num_attention_heads
        split = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key))
        q, k = split
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@contextmanager
def _kept(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, a forward pass of a BERT leaves its hidden states and then queries and keys in the list."""
    hidden: list[Tensor] = []
    projected: list[Tensor] = []
    found: list[Tensor] = []

    def keep(into: list[Tensor]) -> Callable[..., None]:
        return lambda module, args, output: into.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for layer in model.encoder.layer:
        attention = layer.attention.self
        handles += [m.register_forward_hook(keep(projected)) for m in (attention.query, attention.key)]
        handles.append(layer.register_forward_hook(keep(hidden)))
    yield found
    found += hidden + projected
    for handle in handles:
        handle.remove()


def _batch(words: int, batch: int, tokens: int, padded: bool, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((batch, 1), tokens)
    if padded:
        lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator)
        lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    ids = torch.randint(0, words, (batch, tokens), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def main() -> None:
    """Take three steps in one way; with a file, note there how long each of eight more takes, memory kept if asked."""
    configuration, how, *more = json.loads(sys.argv[1]), *sys.argv[2:]
    if more and more[1] == "kept" and (refused := keep_memory()):
        raise OSError(refused["memory"])
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(**configuration, folder=folder)
        for _ in range(3):
            getattr(steps, how)()
        if more:
            Path(more[0]).write_text(json.dumps([time_call(getattr(steps, how)) for _ in range(8)]))


if __name__ == "__main__":
    main()
