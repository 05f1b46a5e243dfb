# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How much work a training step is, and how much of the machine it uses."""

from __future__ import annotations

import re
import time

import torch
from torch import nn

from transformers_bagel import BagelForConditionalGeneration
from transformers_bagel.segments import IGNORED_LABEL, IMAGE_TOKEN, LATENT_TOKEN
from transformers_bagel.sequence import SequenceLayout
from transformers_bagel.training.freezing import FREEZABLE_PARTS


class StepFlops:
    """Floating-point operations of a training step by the shapes of its matrix products, as model-FLOPs utilisation
    counts them: recomputation by gradient checkpointing is no work.

    Args:
        model ([`BagelForConditionalGeneration`]): Before it is sharded.
    """

    def __init__(self, model: BagelForConditionalGeneration):
        config = model.config.get_text_config()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        reaches = {
            tower: any(re.match(pattern, name) for name in trained) for tower, pattern in FREEZABLE_PARTS.items()
        }
        # A gradient goes through the language model whatever is trained, and through the tower only to get to itself.
        reaches["und"] = not model.config.freeze_und
        reaches["gen"] = True
        reaches["connector"] |= reaches["vit"]
        # Operations a token: a product forward, one for the gradient that goes through, one for the weights' own.
        self.per_token = dict.fromkeys(FREEZABLE_PARTS, 0)
        for name, module in model.named_modules():
            tower = next((tower for tower, pattern in FREEZABLE_PARTS.items() if re.match(pattern, f"{name}.")), None)
            # The head works on targets and the time embedder on images: neither takes every token.
            each_token = name != "lm_head" and "time_embedder" not in name
            if isinstance(module, nn.Linear) and tower is not None and each_token:
                products = 1 + reaches[tower] + module.weight.requires_grad
                self.per_token[tower] += 2 * products * module.in_features * module.out_features
        self.head = 2 * (2 + model.lm_head.weight.requires_grad) * config.hidden_size * config.vocab_size
        head_dim = model.model.language_model.layers[0].self_attn.head_dim
        self.attention = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_dim

    def __call__(self, layout: SequenceLayout) -> int:
        """Operations of forward and backward of one batch with labels."""
        types, documents, labels = layout.token_types, layout.document_ids, layout.labels
        assert documents is not None and labels is not None
        real = documents >= 0
        counts = {
            "und": int(((types != LATENT_TOKEN) & real).sum()),
            "gen": int((types == LATENT_TOKEN).sum()),
            "vit": int((types == IMAGE_TOKEN).sum()),
            "connector": int((types == IMAGE_TOKEN).sum()),
        }
        linear = sum(count * self.per_token[tower] for tower, count in counts.items())
        head = self.head * int((labels != IGNORED_LABEL).sum())
        lengths = documents[real].bincount().float()
        return linear + head + int(self.attention * lengths.square().sum())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on a device: the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    # Its own generator: the training's numbers must not depend on whether the peak is measured.
    left = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product = left @ left
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best
