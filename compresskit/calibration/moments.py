"""Calibration: what a model's layers see, as numbers from which fits know which errors matter."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.errors import CalibrationError
from compresskit.surgery.sites import Kind, Survey, find_sites, site_weight

PROBED = 4096
"""Values of each weight whose signs tell models apart; signs, because loading in another dtype keeps them."""


@final
@dataclass(frozen=True)
class Use:
    """What one module saw, over all real tokens of the samples. Tensors are float32, counts float64, on the CPU.

    Args:
        kind: of the module.
        rows, cols: shape of its weight.
        tokens: real tokens, that is rows of its input, that it saw; lookups of an embedding.
        inputs: mean of x x^T, (cols, cols), or of x^2, (cols,), for a layer that is wider than `max_width`; None for an
            embedding. Layers that read the same tensor share it.
        mean: mean of x, (cols,); None for an embedding.
        counts: lookups of each row, (rows,); None but for an embedding.
        gradients: mean over the tokens of g g^T or g^2, g being the gradient of the loss at the module's output;
            None unless asked for.
    """

    kind: Kind
    rows: int
    cols: int
    tokens: int
    inputs: Tensor | None = field(default=None, repr=False)
    mean: Tensor | None = field(default=None, repr=False)
    counts: Tensor | None = field(default=None, repr=False)
    gradients: Tensor | None = field(default=None, repr=False)


@final
@dataclass(frozen=True)
class Calibration:
    """Moments of every layer that was reached, and where they come from.

    Args:
        uses: by module name; a tied weight has an entry for each module that holds it.
        unreached: layers that no batch came to, such as experts that were never chosen; of a tied weight, if no batch
            came to any of the layers that hold it.
        unmasked: layers whose input has another length than any mask, so that padding may have been counted.
        fingerprint: of the model, see `fingerprint_of`.
        samples, tokens: examples, and real tokens of the model's input (its examples if it has no mask or ids).
        loss: whose gradients were taken; None for none.
        max_width: wider layers have only the diagonal of a moment.
        memory_bytes: that the moments take.
        provenance: plain data on data and versions.
    """

    uses: Mapping[str, Use]
    unreached: tuple[str, ...]
    unmasked: tuple[str, ...]
    fingerprint: str
    samples: int
    tokens: int
    loss: str | None
    max_width: int
    memory_bytes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: nn.Module, survey: Survey | None = None) -> None:
        """Raise CalibrationError unless this is of `model`."""
        survey = survey or find_sites(model)
        for site in survey.sites:
            for name in site.names:
                use = self.uses.get(name)
                if use is not None and (use.rows, use.cols) != (site.rows, site.cols):
                    raise CalibrationError(
                        f"this calibration was made for another model: there {name!r} is {use.rows} x {use.cols}, here "
                        f"{site.rows} x {site.cols}"
                    )
        known = {*self.uses, *self.unreached}
        strangers = sorted(known - {name for site in survey.sites for name in site.names})
        strangers += [site.name for site in survey.sites if not known.intersection(site.names)]
        if strangers:
            raise CalibrationError(
                f"this calibration was made for another model: {len(strangers)} layers are in one of the two only, "
                f"among them {strangers[0]!r}"
            )
        if self.fingerprint != fingerprint_of(model, survey):
            raise CalibrationError(
                "this calibration was made for another model: the layers have the same names and shapes, but other "
                "weights; calibrate this one"
            )

    @property
    def few_tokens(self) -> tuple[str, ...]:
        """Layers that saw fewer tokens than their input is wide: their moments are of lower rank than the weight.

        The fits allow for that, but what those tokens do not span costs them nothing.
        """
        return tuple(
            name for name, use in self.uses.items() if use.inputs is not None and use.tokens < use.cols
        )  # an embedding has no second moment to fill

    def warnings(self) -> list[str]:
        """What whoever relies on these moments should know, in sentences."""
        said = []
        if few := self.few_tokens:
            use = self.uses[few[0]]
            said.append(
                f"{len(few)} of {len(self.uses)} layers saw fewer tokens than their input has columns ({few[0]}: "
                f"{use.tokens:,} tokens, {use.cols:,} columns); more samples make their fits better"
            )
        if self.unreached:
            said.append(
                f"no sample came to {', '.join(self.unreached[:4])}{', ...' if self.unreached[4:] else ''} "
                f"({len(self.unreached)} in all); fitted without data"
            )
        if self.unmasked:
            said.append(
                f"padding could not be told from text in {', '.join(self.unmasked[:4])}"
                f"{', ...' if self.unmasked[4:] else ''} ({len(self.unmasked)} in all), and was counted"
            )
        return said

    def with_even_words(self) -> "Calibration":
        """The same moments, but every row of an embedding counts alike, however often the samples named it.

        For texts unlike those of the later use, and for a model that is trained afterwards: it learns frequent words by
        itself, the others hardly.
        """
        uses = {
            name: use
            if use.counts is None
            else replace(use, counts=torch.full_like(use.counts, float(use.counts.mean())))
            for name, use in self.uses.items()
        }
        return replace(self, uses=uses, provenance={**self.provenance, "even_words": True})

    def save(self, file: str | Path) -> None:
        """Write a safetensors file that `load_calibration` reads; complete or not there.

        Raises:
            OutputError: it cannot be written.
        """
        from compresskit.calibration.files import save_calibration  # which imports this module

        save_calibration(self, file)

    def to_json(self) -> dict[str, Any]:
        """Facts without the tensors."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "layers": len(self.uses),
            "unreached": list(self.unreached),
            "unmasked": list(self.unmasked),
            "few_tokens": list(self.few_tokens),
            "loss": self.loss,
            "max_width": self.max_width,
            "memory_bytes": self.memory_bytes,
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
        }


def fingerprint_of(model: nn.Module, survey: Survey | None = None) -> str:
    """A hash of the names, shapes and signs of up to PROBED values of every weight that can be replaced."""
    digest = hashlib.sha256()
    for site in (survey or find_sites(model)).sites:
        digest.update(f"{site.names} {site.rows} {site.cols};".encode())
        weight = site_weight(model, site)
        step = max(1, weight.shape[0] * weight.shape[1] // PROBED)
        index = torch.arange(0, weight.shape[0] * weight.shape[1], step, device=weight.device)
        values = weight[index // weight.shape[1], index % weight.shape[1]]
        digest.update(torch.signbit(values).cpu().numpy().tobytes())
    return digest.hexdigest()
