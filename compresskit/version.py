"""The version of this release, also read by packaging and by `compresskit --version`."""

__version__ = "0.1.0"
