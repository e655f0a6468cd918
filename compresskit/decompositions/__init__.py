"""One file per decomposition; importing this package registers every file in it. An import error is not hidden."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
