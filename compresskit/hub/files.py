"""Headers of safetensors files: what is inside, without reading it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from compresskit.errors import CheckpointError
from compresskit.hub.names import Model, factor_shapes, reader

Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in these files; the headers alone are read.

    Raises:
        CheckpointError: a file is missing, cut short, damaged, or not a safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is not a safetensors file; compressed checkpoints are never read from pickles"
            )
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is not complete")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}); download or copy it again") from error
    return shapes


def unreal_tensors(files: Iterable[Path]) -> dict[str, str]:
    """Name and type of each tensor in these sound files that does not hold real numbers: I64, BOOL, C64."""
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            types = {name: str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
            found.update({name: kind for name, kind in types.items() if not kind.startswith(("F", "BF"))})
    return found


def check_factors(model: Model, shapes: Shapes) -> None:
    """Check that the files hold every tensor of every factorised module, in its shape.

    transformers would only warn of what is missing and leave memory as it was found. A tied tensor is stored under
    one of its names.

    Raises:
        CheckpointError: names the tensors that are missing or of another shape.
    """
    read = reader(model)
    stored = {read(name): shape for name, shape in shapes.items()}
    twins = _twins(model)
    wrong: list[str] = []
    for name, shape in factor_shapes(model).items():
        found = next((stored[twin] for twin in (name, *twins.get(name, ())) if twin in stored), None)
        if found is None:
            wrong.append(f"{name} {shape} is missing")
        elif found != shape:
            wrong.append(f"{name} is {found}, not {shape}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the map in config.json does not fit the weights: {'; '.join(wrong[:3])}{more}. Both files must come from "
            "one save"
        )


def _twins(model: Model) -> dict[str, set[str]]:
    """Names that stand for one tensor, by each of them."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name: group for group in groups.values() for name in group}
