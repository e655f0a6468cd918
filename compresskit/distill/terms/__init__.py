"""One file per loss; `compresskit.distill.losses()` finds them."""
