"""Machines that plans can be made for: each TOML file of this folder is one, and so is any file of the same form.

`measure_machine` makes one of where it runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from compresskit.machines.find import (
    DEFAULT,
    machine,
    machine_for,
    machine_from_data,
    machine_text,
    machine_to_data,
    machines,
    processor,
)

if TYPE_CHECKING:
    from compresskit.machines.measure import (
        Closeness,
        Measured,
        closeness,
        measure_machine,
        random_layer,
    )

__all__ = [
    "DEFAULT",
    "Closeness",
    "Measured",
    "closeness",
    "machine",
    "machine_for",
    "machine_from_data",
    "machine_text",
    "machine_to_data",
    "machines",
    "measure_machine",
    "processor",
    "random_layer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # all that is not imported above: it takes scipy.optimize, which plans do not
        return getattr(importlib.import_module("compresskit.machines.measure"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
