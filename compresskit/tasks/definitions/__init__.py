"""The tasks that compresskit knows by name: each file registers some. A new task is one call in a new file."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
