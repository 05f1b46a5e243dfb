# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How much work a training step is, and how much of the machine it uses."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import torch
from torch import nn

from transformers_bagel import BagelForConditionalGeneration
from transformers_bagel.modeling_bagel import TOWERS
from transformers_bagel.sequence_bagel import IMAGE_TOKEN, LATENT_TOKEN


class StepFlops:
    """Floating-point operations of a training step by the shapes of its matrix products, as model-FLOPs utilisation
    counts them: recomputation by gradient checkpointing is no work.

    Args:
        model ([`BagelForConditionalGeneration`]): Before it is sharded.
    """

    def __init__(self, model: BagelForConditionalGeneration):
        config = model.config.get_text_config()
        self.weights = dict.fromkeys(TOWERS, 0)
        for name, module in model.named_modules():
            tower = next((tower for tower, pattern in TOWERS.items() if re.match(pattern, f"{name}.")), None)
            # The head works on targets and the time embedder on images: neither takes every token.
            each_token = name != "lm_head" and "time_embedder" not in name
            if isinstance(module, nn.Linear) and tower is not None and each_token:
                self.weights[tower] += module.in_features * module.out_features
        self.head = config.hidden_size * config.vocab_size
        head_dim = model.model.language_model.layers[0].self_attn.head_dim
        self.attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim
        # Without gradients of the weights, backward is one product for each of forward's instead of two.
        trained = [parameter.requires_grad for parameter in model.parameters() if parameter.ndim == 2]
        self.backward = 2 if all(trained) else 1

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Operations of forward and backward of one batch."""
        types, documents = batch["mm_token_type_ids"], batch["document_ids"]
        real = documents >= 0
        counts = {
            "und": int(((types != LATENT_TOKEN) & real).sum()),
            "gen": int((types == LATENT_TOKEN).sum()),
            "vit": int((types == IMAGE_TOKEN).sum()),
            "connector": int((types == IMAGE_TOKEN).sum()),
        }
        linear = sum(2 * count * self.weights[tower] for tower, count in counts.items())
        head = 2 * self.head * int((batch["labels"] != -100).sum())
        lengths = documents[real].bincount().float()
        attention = int(self.attention * lengths.square().sum())
        return (linear + head + attention) * (1 + self.backward)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on a device: the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = left @ left
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best
