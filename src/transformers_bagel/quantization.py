# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What stays whole when a model is quantised."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn
from transformers.quantizers import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

from .checkpoints import module_name


# Patterns of the layers between latents, pixels or timesteps and tokens: 0.2 % of the weights. Quantising them costs quality
# and saves nothing. Quantisers leave norms, position tables, embeddings and the head alone by themselves.
SENSITIVE_MODULES = tuple(
    rf".*{name}" for name in ("vae2llm", "llm2vae", "time_embedder", "connector", "patch_embedding")
)

# What the quantisation configs of the library call the modules that stay as they are.
_EXCEPTIONS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")


def spare_sensitive_layers(quantization_config: Any, model: Any) -> Any:
    """A copy of the quantisation config (or its `dict`) of a model on any device, with our exceptions on top of the user's,
    or of the library's if the user has none."""
    config = copy.deepcopy(quantization_config)
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    name = next((name for name in _EXCEPTIONS if hasattr(config, name)), None)
    if name is not None:
        given = getattr(config, name)
        exceptions = get_keys_to_not_convert(model) if given is None else list(given)
        exceptions.extend(SENSITIVE_MODULES)
        if getattr(config, "load_in_4bit", False):
            # The kernel of bitsandbytes for CPUs with AVX512-BF16 packs 32 rows, in blocks of 64 columns.
            exceptions.extend(undivided_modules(model, 32, 64))
        if getattr(config, "weight_block_size", None):
            # FP8 has a scale for each whole block.
            exceptions.extend(undivided_modules(model, *config.weight_block_size))
        setattr(config, name, exceptions)
    return config


def named_as_modules(quantization_config: Any) -> Any:
    """What an `auto-round` config says of layers, by the names of our modules instead of the original ones."""
    if not isinstance(quantization_config, dict) or "round" not in str(quantization_config.get("quant_method")):
        return quantization_config
    named = dict(quantization_config)
    for key in ("block_name_to_quantize", "to_quant_block_names", "modules_to_not_convert"):
        if (value := named.get(key)) is not None:
            names = value.split(",") if isinstance(value, str) else value
            named[key] = [own_name(name.strip()) for name in names]
    if isinstance(named.get("extra_config"), dict):
        named["extra_config"] = {own_name(name): value for name, value in named["extra_config"].items()}
    return named


def own_name(name: str) -> str:
    """The name of a module, which may be the beginning of a name, from that in the original code."""
    return module_name(f"{name}.").removesuffix(".")


def undivided_modules(model: nn.Module, rows: int, columns: int) -> list[str]:
    """Patterns of the linear layers whose weights are no whole number of blocks. The MLP of the original vision tower is
    4,304 wide."""
    return [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.out_features % rows or module.in_features % columns)
    ]
