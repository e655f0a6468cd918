"""The `quantization_config` block of config.json: which module has which structure, and where it all came from."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, final

from transformers.utils.quantization_config import QuantizationConfigMixin

from compresskit.errors import CheckpointError
from compresskit.surgery.layout import Entry, Layout

QUANT_METHOD = "compresskit"
FORMAT_VERSION = 1
"""Of checkpoints. Raised only when an older release could misread a newer file."""


@final
class CompresskitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a compressed checkpoint says of itself. transformers builds it from JSON and writes it back.

    Args:
        sites: module name -> JSON of its `Entry`; read by `layout`, not here.
        provenance: plain data for the reader: method, ratio, source, seed.
        format_version: of the file that was read.
        quant_method: the name by which transformers finds us.
        unknown: keys that a later release of the same format may have added; kept as they are.
    """

    def __init__(
        self,
        sites: Any = None,
        provenance: Any = None,
        format_version: Any = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        self.format_version = format_version
        self.sites = sites
        self.provenance = {} if provenance is None else provenance
        self._unknown = unknown

    def to_dict(self) -> dict[str, Any]:
        known = {key: value for key, value in vars(self).items() if key != "_unknown"}
        return copy.deepcopy({**self._unknown, **known})

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def layout(self) -> dict[str, Entry]:
        """The map, checked; nothing is allocated.

        Raises:
            CheckpointError: a newer format, no map, or a map with unknown structures or insane sizes.
        """
        check_format(self.format_version)
        if not isinstance(self.sites, Mapping):
            raise CheckpointError(
                f"the quantization_config of this checkpoint has no map: 'sites' is {self.sites!r}, not an object of "
                "module names; its config.json is damaged or was edited"
            )
        return {name: Entry.from_json(name, data) for name, data in self.sites.items()}


def check_format(version: Any) -> None:
    """Raise CheckpointError unless this release reads checkpoints of this format version."""
    if type(version) is not int or version < 1:
        raise CheckpointError(f"format_version of a compresskit checkpoint is 1 or more, this one says {version!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"this checkpoint was written by a newer compresskit: it has format version {version}, this release reads "
            f"up to {FORMAT_VERSION}. Upgrade: pip install --upgrade compresskit"
        )


def sites_json(layout: Layout) -> dict[str, Any]:
    """The `sites` of a layout."""
    return {name: entry.to_json() for name, entry in layout.items()}
