"""How transformers finds us: `from_pretrained` and `save_pretrained` of compressed models.

transformers calls a checkpoint with a map of its own "quantized"; nothing here is quantised. The hooks are those of
`transformers.quantizers.HfQuantizer`.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from compresskit.core.modules import FactorizedEmbedding
from compresskit.errors import CheckpointError
from compresskit.hub.config import QUANT_METHOD, CompresskitConfig, sites_json
from compresskit.hub.files import check_factors, tensor_shapes
from compresskit.hub.guard import ignore_sentinels_, sentinel_names, sentinels
from compresskit.hub.names import Model, factor_shapes, reader, resolve_names, stored_layout
from compresskit.hub.tied import tie_factors_
from compresskit.surgery.layout import dequantize_ as swap_for_dense_
from compresskit.surgery.layout import install_, layout_of


@final
class CompresskitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives a fresh model its empty factorised modules before the weights load, and describes it when it is saved."""

    def __init__(self, quantization_config: CompresskitConfig, *, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            raise CheckpointError(
                "from_pretrained does not compress: load the model without quantization_config, then call "
                "compresskit.compress(model, ...)"
            )
        super().__init__(quantization_config, pre_quantized=True, **kwargs)

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """First of the hooks: refuse what cannot be read before anything else looks at the folder."""
        self.quantization_config.layout()

    def _process_model_before_weight_loading(
        self, model: Model, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Model:
        layout = self.quantization_config.layout()
        ignore_sentinels_(model, map(reader(model), sentinel_names(layout)))
        install_(model, resolve_names(model, layout))
        tie_factors_(model)
        if checkpoint_files is not None:
            check_factors(model, tensor_shapes(checkpoint_files))
        return model

    def _process_model_after_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        _refuse_random(model)
        for module in model.modules():
            if isinstance(module, FactorizedEmbedding) and module.padding_row is not None:
                module.padding_row.requires_grad_(False)  # loading makes every number trainable
        _attach_(model, self)
        return model

    def get_state_dict_and_metadata(self, model: Model) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Tensors to save, sentinels included. The first hook of saving, so it brings the map up to date too."""
        if not layout_of(model):  # all layers were made dense again: an ordinary checkpoint
            _detach_(model)
            return None, {}
        _describe_(model, self)
        return {**model.state_dict(), **sentinels(model)}, {}

    def dequantize(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        """`model.dequantize()`: dense layers again, in the dtype of their factors or the whole model in `dtype`."""
        model = self._dequantize(model)
        return model if dtype is None else model.to(dtype)

    def _dequantize(self, model: Model, dtype: torch.dtype | None = None) -> Model:
        dequantize_(model, dtype)
        return model


def register_() -> None:
    """Make both classes known to transformers; a second import of this package replaces the first."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(CompresskitConfig)
    register_quantizer(QUANT_METHOD)(CompresskitQuantizer)


def check_unquantized(model: nn.Module) -> None:
    """Raise CheckpointError if transformers holds this model to be quantised by another library."""
    for part in model.modules():
        quantizer = getattr(part, "hf_quantizer", None) if isinstance(part, PreTrainedModel) else None
        if quantizer is not None and not isinstance(quantizer, CompresskitQuantizer):
            method = quantizer.quantization_config.quant_method
            raise CheckpointError(
                f"this model is already quantised by {getattr(method, 'value', method)}, and a checkpoint has room for "
                "one method only; load the unquantised model"
            )


def mark_compressed(model: nn.Module, provenance: Mapping[str, Any] | None = None) -> None:
    """Make a model whose layers were replaced ready for `save_pretrained`, `push_to_hub` and `Trainer`.

    Marks each transformers model inside `model` (itself, or the one in a SentenceTransformer); in a model that is not
    from transformers there is nothing to mark. Marking again brings everything up to date.

    Args:
        provenance: plain data that the checkpoint keeps.

    Raises:
        CheckpointError: it is already quantised by another library.
    """
    check_unquantized(model)
    for part in _outermost(model):
        if layout_of(part):
            _attach_(part, CompresskitQuantizer(CompresskitConfig(provenance=dict(provenance or {}))))


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every factorised module by the dense layer that it stands for; tied ones stay tied. Changes the model.

    What transformers was told of the factors is taken back, so that `save_pretrained` writes an ordinary checkpoint.
    """
    swap_for_dense_(model, dtype)
    for part in _outermost(model):
        if isinstance(getattr(part, "hf_quantizer", None), CompresskitQuantizer):
            _detach_(part)


def _outermost(model: nn.Module) -> list[Model]:
    if isinstance(model, PreTrainedModel):
        return [model]
    return [part for child in model.children() for part in _outermost(child)]


def _parts(model: Model) -> list[Model]:
    """The model and the transformers models inside it, any of which may be saved on its own."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _attach_(model: Model, quantizer: CompresskitQuantizer) -> None:
    model.quantization_method = QUANT_METHOD
    model.add_model_tags([QUANT_METHOD])
    model.is_quantized = False  # or `.half()` and `.float()` refuse
    for part in _parts(model):
        part.hf_quantizer = quantizer
        part.config._is_quantized = True  # flash attention then asks the config for the dtype, not the first nn.Linear
    tie_factors_(model)
    _describe_(model, quantizer)


def _describe_(model: Model, quantizer: CompresskitQuantizer) -> None:
    """Write into the config what the model is now."""
    quantizer.quantization_config.sites = sites_json(stored_layout(model))
    model.config.quantization_config = quantizer.quantization_config


def _detach_(model: Model) -> None:
    model.model_tags = [tag for tag in model.model_tags or [] if tag != QUANT_METHOD] or None
    for part in _parts(model):
        part.is_quantized = False
        if part.__dict__.get("_weight_conversions") == []:
            del part._weight_conversions
        for name in ("hf_quantizer", "quantization_method"):
            part.__dict__.pop(name, None)
        for name in ("quantization_config", "_is_quantized"):
            part.config.__dict__.pop(name, None)
    tie_factors_(model)


def _refuse_random(model: Model) -> None:
    """Raise CheckpointError if a factor was not loaded, under whatever name transformers looked for it."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return  # tensors were moved to several devices and lost transformers' flag
    factors = {name: model.get_parameter(name) for name in factor_shapes(model)}
    random = [name for name, p in factors.items() if not (p.is_meta or getattr(p, "_is_hf_initialized", False))]
    if random:
        raise CheckpointError(
            f"transformers found no tensor for {', '.join(random[:3])}{' and more' if random[3:] else ''}; the names "
            "in the files do not fit the map, or key_mapping renamed them"
        )
