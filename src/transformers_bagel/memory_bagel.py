# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What stays whole when a model is quantised, and what moves together when it is offloaded."""

from __future__ import annotations

import re

from torch import nn


# Patterns of layers that every image and every velocity passes: 0.2 % of the weights. Quantising them hurts quality and saves
# nothing. Quantisers leave norms, position tables, embeddings and the head alone by themselves.
SENSITIVE_MODULES = {rf".*{name}" for name in ("vae2llm", "llm2vae", "time_embedder", "connector", "patch_embedding")}

# Modules that group offloading looks into for layers, and those that are used outside the forward of their owner: each
# of them has to be moved by itself.
OFFLOAD_BLOCKS = [
    *("model", "language_model", "vision_tower", "encoder"),
    *("embed_tokens", "rotary_emb", "norm_moe_gen", "connector", "vit_pos_embed"),
]


def unpackable_modules(model: nn.Module) -> set[str]:
    """
    Patterns of the linear layers that bitsandbytes cannot hold in 4 bits on every device.

    Its kernel for CPUs with AVX512-BF16 packs 32 rows, in blocks of 64 columns. The MLP of the published vision tower is
    4,304 wide.

    Args:
        model (`PreTrainedModel`): A model that is about to be loaded.

    Returns:
        `set[str]`: Empty unless its configuration asks for 4 bits.
    """
    if not getattr(getattr(model.config, "quantization_config", None), "load_in_4bit", False):
        return set()
    return {
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module.in_features % 64 or module.out_features % 32)
    }
