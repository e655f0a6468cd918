"""What is in a compressed checkpoint, read from its config and the headers of its weights alone."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from compresskit.core.structure import Structure
from compresskit.errors import CheckpointError
from compresskit.hub.files import Shapes, tensor_shapes
from compresskit.hub.guard import SHAPE
from compresskit.hub.load import read_config, read_map, weight_files
from compresskit.surgery.layout import Layout


@final
@dataclass(frozen=True)
class InspectedSite:
    """One factorised module of a checkpoint; `shared_with` owns its factors if it is tied."""

    name: str
    structure: Structure
    shared_with: str | None


@final
@dataclass(frozen=True)
class Inspection:
    """A compressed checkpoint.

    Args:
        architecture: the class that it was saved from.
        sites: factorised modules.
        params: stored parameters, tied ones once.
        dense_params: the same model with dense weights.
        weight_bytes: size of the weight files.
        provenance: what the checkpoint says of how it was made.
    """

    architecture: str
    format_version: int
    sites: tuple[InspectedSite, ...]
    params: int
    dense_params: int
    weight_bytes: int
    provenance: Mapping[str, Any]

    @property
    def ratio(self) -> float:
        """Original / compressed parameters of the whole model."""
        return self.dense_params / self.params

    def to_json(self) -> dict[str, Any]:
        """Plain data, the ratio included."""
        sites = [dataclasses.asdict(site) | {"structure": site.structure.to_json()} for site in self.sites]
        return dataclasses.asdict(self) | {"ratio": self.ratio, "sites": sites}


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read a compressed checkpoint without loading a weight.

    Raises:
        CheckpointError: not a compressed checkpoint, a newer format, or damaged files.
    """
    found = read_map(folder)
    if found is None:
        raise CheckpointError(f"{folder} is a model, but not one that compresskit compressed")
    layout = found.layout()
    if not isinstance(found.provenance, Mapping):
        raise CheckpointError(f"'provenance' in {folder / 'config.json'} is {found.provenance!r}, not an object")
    files = weight_files(folder)
    shapes = tensor_shapes(files)
    _check_fit(layout, shapes)
    stored = {name: math.prod(shape) for name, shape in shapes.items()}
    sites = [InspectedSite(name, e.structure, next(iter(e.shares.values()), None)) for name, e in layout.items()]
    owned = [site for site in sites if site.shared_with is None]
    params = sum(stored.values()) - sum(_sentinel(stored, site.name) for site in owned)
    padding = sum(n for name, n in stored.items() if name.endswith(".padding_row"))
    factors = sum(site.structure.num_params for site in owned)
    dense = sum(site.structure.rows * site.structure.cols for site in owned)
    return Inspection(
        architecture=", ".join(read_config(folder).get("architectures") or ["unknown"]),
        format_version=found.format_version,
        sites=tuple(sites),
        params=params,
        dense_params=params - factors - padding + dense,
        weight_bytes=sum(file.stat().st_size for file in files),
        provenance=found.provenance,
    )


def _check_fit(layout: Layout, shapes: Shapes) -> None:
    """Raise CheckpointError if the numbers would be wrong: a factor that is not stored as the map says, or more."""
    holders: dict[tuple[str, str], list[str]] = {}
    for name, entry in layout.items():
        for factor in entry.structure.factor_specs():
            holders.setdefault((entry.shares.get(factor, name), factor), []).append(name)
    wrong: list[str] = []
    for (_, factor), names in holders.items():
        wanted = layout[names[0]].structure.factor_specs()[factor].shape
        keys = [f"{name}.{factor}{end}" for name in names for end in ("", ".weight")]
        found = next((shapes[key] for key in keys if key in shapes), None)
        if found != wanted:
            wrong.append(f"{names[0]}.{factor} is {'missing' if found is None else f'{found}, not {wanted}'}")
    wrong += [f"{name} is not in the map" for name in _factorised(shapes) if name not in layout]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the map in config.json does not fit the weights: {'; '.join(wrong[:3])}{more}. Both files must come from "
            "one save"
        )


def _factorised(shapes: Shapes) -> list[str]:
    """Modules that left the guard's tensor (see guard.py) and something beside it."""
    marked = [
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and shape == SHAPE
    ]
    return [m for m in marked if any(n.startswith(f"{m}.") and n not in (f"{m}.weight", f"{m}.bias") for n in shapes)]


def _sentinel(stored: Mapping[str, int], name: str) -> int:
    """1 if the weights hold the guard's tensor for this module (see guard.py)."""
    return int(stored.get(f"{name}.weight") == 1)
