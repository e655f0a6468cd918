"""Calibration of a model: one streaming pass over samples that collects what every layer sees."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.collect import Collector, shapes_of, undisturbed
from compresskit.calibration.data import Batch, Data, arguments, read_batches
from compresskit.calibration.gradients import loss_of
from compresskit.calibration.masks import Masks
from compresskit.calibration.moments import Calibration, fingerprint_of
from compresskit.errors import CalibrationError
from compresskit.surgery.pricing import OnProgress, Progress
from compresskit.surgery.sites import find_sites

MAX_WIDTH = 4096
"""A full moment of this width takes 64 MiB; one of 11,008 columns would take 462."""


def calibrate(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Any = None,
    samples: int = 128,
    max_length: int = 128,
    batch_size: int = 8,
    gradients: bool = False,
    max_width: int = MAX_WIDTH,
    max_memory_bytes: int | None = None,
    share: bool = True,
    seed: int = 0,
    on_memory: Callable[[int], None] | None = None,
    on_progress: OnProgress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Second moments and means of what every layer reads, token counts of embeddings, and gradients if asked.

    One pass in evaluation mode; padding does not count. The first batch is run once more beforehand, to see which
    layers read the same tensor; they share their moments, and what all will take is known before it is taken.
    Afterwards the model is as it was: hooks, modes, gradients and all.

    Args:
        model: any `nn.Module`; encoder, decoder or both.
        data: text file or folder, texts, a `datasets.Dataset` or batches, see `read_batches`.
        tokenizer: for texts.
        samples: examples in all.
        max_length: tokens of a text.
        batch_size: examples that are run together.
        gradients: also collect second moments of gradients at outputs (K-FAC); about twice the time and memory.
        max_width: inputs and outputs that are wider get the diagonal of the moment alone.
        max_memory_bytes: raise an error rather than take more for moments.
        share: false: no layers share moments.
        seed: of the sample of data and of drawn labels.
        on_memory: told before the pass what the moments will take, in bytes.
        on_progress: called after each batch.
        provenance: plain data that is kept.

    Raises:
        CalibrationError: no sample, a batch of padding alone, values that are not finite (names the layer), too much
            memory, no tokenizer.
        DataError: the data cannot be read.
    """
    survey = find_sites(model)
    if not survey.sites:
        raise CalibrationError("the model has no layer that can be replaced, so there is nothing to calibrate")
    batches = read_batches(data, tokenizer, samples=samples, max_length=max_length, batch_size=batch_size, seed=seed)
    collector = Collector(shapes_of(survey.sites), max_width=max_width, share=share, gradients=gradients)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    loss: str | None = None
    seen = tokens = 0
    with undisturbed(model), collector.watching(model):
        for number, (batch, trial) in enumerate(_with_trial(batches), -1):
            given = arguments(model, batch, device)
            masks = Masks.of(given)
            if masks.all_padding():
                raise CalibrationError(
                    f"batch {max(number, 0)} holds nothing but padding: its attention mask is 0 throughout"
                )
            collector.begin(masks, batch=number, trial=trial)
            if trial:
                forward(model, given, gradients=False)
                _announce(collector.memory_bytes(), max_memory_bytes, on_memory)
                continue
            output = forward(model, given, gradients=gradients)
            if gradients:
                total, loss = loss_of(model, output, given, masks, generator)
                total.backward()
            first = next(iter(given.values()))
            seen, tokens = seen + len(first), tokens + _tokens(masks, given)
            if on_progress is not None:
                on_progress(Progress("calibrate", f"{tokens:,} tokens", seen, max(samples, seen)))
    if seen == 0:
        raise CalibrationError("the data holds no sample")
    memory_bytes = collector.memory_bytes()
    uses = collector.uses()
    names = [name for site in survey.sites for name in site.names]
    return Calibration(
        uses=uses,
        unreached=tuple(name for site in survey.sites if not uses.keys() & {*site.names} for name in site.names),
        unmasked=tuple(name for name in names if name in collector.unmasked),
        fingerprint=fingerprint_of(model, survey),
        samples=seen,
        tokens=tokens,
        loss=loss,
        max_width=max_width,
        memory_bytes=memory_bytes,
        provenance=dict(provenance or {}),
    )


def _with_trial(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """The first batch for a trial, then all of them."""
    for first in itertools.islice(batches, 1):
        yield first, True
        yield first, False
        yield from ((batch, False) for batch in batches)


def forward(model: nn.Module, given: Mapping[str, Tensor], *, gradients: bool) -> Any:
    """What the model returns; nothing is cached for generation."""
    quiet = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.set_grad_enabled(gradients):
        return model(**given, **quiet)


def _announce(memory_bytes: int, most: int | None, on_memory: Callable[[int], None] | None) -> None:
    if most is not None and memory_bytes > most:
        raise CalibrationError(
            f"the moments of this model take {memory_bytes / 1e9:.2f} GB, more than the {most / 1e9:.2f} GB allowed; "
            "lower max_width, or leave gradients out"
        )
    if on_memory is not None:
        on_memory(memory_bytes)


def _tokens(masks: Masks, given: Mapping[str, Tensor]) -> int:
    if masks.main is not None:
        return int(masks.main.sum())
    ids = given.get("input_ids")
    return ids.numel() if ids is not None else len(next(iter(given.values())))
