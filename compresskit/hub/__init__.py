"""Checkpoints as ordinary Hugging Face folders. The only package that touches transformers' loading machinery."""

from compresskit.hub.card import model_card, training_card
from compresskit.hub.config import FORMAT_VERSION, CompresskitConfig
from compresskit.hub.head import load_with_head
from compresskit.hub.inspect import Inspection, inspect_checkpoint
from compresskit.hub.load import load_model, read_map, tensor_names
from compresskit.hub.quantizer import check_unquantized, dequantize_, mark_compressed, register_
from compresskit.hub.save import check_output, save_checkpoint
from compresskit.hub.source import resolve

register_()

__all__ = [
    "FORMAT_VERSION",
    "CompresskitConfig",
    "Inspection",
    "check_output",
    "check_unquantized",
    "dequantize_",
    "inspect_checkpoint",
    "load_model",
    "load_with_head",
    "mark_compressed",
    "model_card",
    "read_map",
    "resolve",
    "save_checkpoint",
    "tensor_names",
    "training_card",
]
