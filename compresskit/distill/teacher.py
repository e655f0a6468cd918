"""The teacher: asked for features, never trained, never saved; with a cache it is asked about an example only once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch
from compresskit.distill.cache import Store, TeacherCache, digests, fingerprint
from compresskit.distill.features import OUTPUTS, Feature, Recorder
from compresskit.distill.layout import Layout

_IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache")
"""Entries of a configuration that do not change the answers."""


@final
class Teacher:
    """A model that answers with features, in evaluation mode and without gradients.

    Args:
        anatomy: of the model.
        features: what is asked; if there are none, the model is never run.
        cache: where answers are kept, or None.
        precision: makes the context that the model runs in, as autocast does.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        features: Sequence[Feature],
        *,
        cache: TeacherCache | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.anatomy = anatomy
        self.features = tuple(features)
        self.precision = precision
        self.forwards = 0
        """How many times the model has run."""
        headless = not any(feature.role in OUTPUTS for feature in self.features)
        self._model = anatomy.model.base_model if headless else anatomy.model
        self.accepted = frozenset(inspect.signature(anatomy.model.forward).parameters)
        self._extra = {"use_cache": False} if anatomy.causal and "use_cache" in self.accepted else {}
        self._cache = cache
        self._store: Store | None = None

    def __call__(self, batch: Batch) -> dict[Feature, Tensor]:
        """The features of a batch."""
        if not self.features:
            return {}
        inputs = {name: value for name, value in batch.inputs.items() if name in self.accepted}
        if self._cache is None:
            return self._run(inputs)
        return self._through_cache(inputs, batch.mask, self._opened(self._cache))

    def flush(self) -> None:
        """Write what the cache holds in memory only."""
        if self._store is not None:
            self._store.flush()

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[Feature, Tensor]:
        model = self._model.eval()
        self.forwards += 1
        with Recorder(self.anatomy, self.features) as recorder, self.precision():
            outputs = model(**inputs, **self._extra)
        recorder.take_outputs(outputs)
        return recorder.features

    def _opened(self, cache: TeacherCache) -> Store:
        if self._store is None:
            model = self.anatomy.model
            with self.precision():
                autocast = [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if _autocasts(kind)]
            question = [*map(str, self.features), *autocast, cache.stored]
            config = {name: value for name, value in model.config.to_dict().items() if name not in _IRRELEVANT}
            self._store = cache.open(fingerprint(config, model.state_dict(), question))
            self._store.refresh()
        return self._store

    def _through_cache(self, inputs: Mapping[str, Tensor], mask: Tensor, store: Store) -> dict[Feature, Tensor]:
        """Look every example up, run the model on those that are new, and put all of them together."""
        keys = digests(inputs, mask)
        found = {key: store.get(key) for key in keys}
        if any(row is None for row in found.values()):
            store.refresh()
            found = {key: store.get(key) for key in keys}
        new = [place for place, key in enumerate(keys) if found[key] is None]
        if new:
            places = torch.tensor(new, device=mask.device)
            answers = self._run({name: value[places] for name, value in inputs.items()})
            answers = {feature: answers[feature] for feature in self.features}
            store.layout = store.layout or Layout.of(answers)
            for place, row in zip(new, store.layout.rows(answers, mask[places], store.dtype), strict=True):
                found[keys[place]] = row
                store.put(keys[place], row)
        assert store.layout is not None, "an answer was found or given"
        return store.layout.answers(self.features, [kept for key in keys if (kept := found[key]) is not None], mask)


def _autocasts(kind: str) -> bool:
    return torch.is_autocast_enabled(kind)
