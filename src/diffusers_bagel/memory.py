# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Less memory for the pipeline: layers cast while they rest, quantised components."""

import re
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig
from diffusers.hooks import apply_layerwise_casting_hook
from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersQuantizationConfig
from diffusers.utils import logging
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from transformers_bagel.packed import is_gguf_config


logger = logging.get_logger(__name__)

# Attention and MLP of the experts and of the vision tower, below their adapters.
_CAST_LAYER = re.compile(r".*\blayers\.\d+\.(self_attn|mlp)\w*\.\w+(\.base_layer)*")


def cast_layers(transformer: Any, storage_dtype: torch.dtype) -> None:
    """
    Keep the linear layers of attention and MLP in a small type while they rest, and cast each to the transformer's own
    type while it computes. Adapters and all other layers stay as they are.

    Raises:
        ValueError: if the transformer is quantised.
    """
    if getattr(transformer, "is_quantized", False):
        raise ValueError("The transformer is quantised: its layers are small already, and are not cast.")
    compute_dtype = transformer.dtype
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and _CAST_LAYER.fullmatch(name):
            apply_layerwise_casting_hook(layer, storage_dtype, compute_dtype, non_blocking=False)


def pipeline_quantization(config: Any) -> PipelineQuantizationConfig:
    """
    The quantization config of a pipeline, from its own or that of its transformer.

    Raises:
        ValueError: if it is neither, or asks for a quantised transformer in diffusers' words.
    """
    if not isinstance(config, PipelineQuantizationConfig):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    quantization = (config.quant_mapping or {}).get("transformer")
    if isinstance(quantization, DiffusersQuantizationConfig) and not is_gguf_config(quantization):
        raise ValueError(
            "`quantization_config`: the transformer is a model of transformers. Import its configuration from "
            "`transformers`, not from `diffusers`."
        )
    return config


def transformer_quantization(config: PipelineQuantizationConfig) -> Any:
    """
    What a pipeline's `quantization_config` says of the transformer of an original checkpoint; `None` if nothing.

    Raises:
        ValueError: if the VAE is to be quantised, which is no repository of diffusers there.
    """
    chosen = config.quant_mapping or config.components_to_quantize or ("transformer", "vae")
    if "vae" in chosen:
        raise ValueError(
            'The VAE of the original layout cannot be quantised. Pass `components_to_quantize=["transformer"]`.'
        )
    unknown = sorted(set(chosen) - {"transformer"})
    if unknown:
        logger.warning(f"`quantization_config` names {', '.join(unknown)}, which are no components to quantise.")
    if "transformer" not in chosen:
        return None
    if config.quant_mapping:
        quantization = config.quant_mapping["transformer"]
    else:
        quantization = AUTO_QUANTIZATION_CONFIG_MAPPING[config.quant_backend](**config.quant_kwargs)
    config.config_mapping["transformer"] = quantization
    return quantization
