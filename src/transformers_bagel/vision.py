# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The layers of the SigLIP tower, over packed images of any size (original behaviour, points 9 and 11)."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .attention import attention
from .configuration_bagel import BagelVisionConfig


class BagelVisionAttention(nn.Module):
    """Attention among the patches of each image; the images are packed."""

    def __init__(self, config: BagelVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, lengths: tuple[int, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        """`(patches, hidden)` -> `(patches, hidden)`, and the weights; `lengths` are the patches of each image."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(0, 1).unsqueeze(0)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if not lengths:
            # No image: all three projections stay in the graph, as a distributed training needs.
            return self.out_proj((query + key + value).transpose(1, 2)[0].flatten(-2)), None
        kwargs |= {"is_causal": False}
        if is_flash_attention_requested(self.config):
            borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            borders = borders.to(hidden_states.device, non_blocking=True)
            kwargs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            kwargs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
            attn_output, attn_weights = attention(self, query, key, value, None, **kwargs)
        else:
            # Neighbours of one size are a batch.
            counts = [(length, len(list(images))) for length, images in itertools.groupby(lengths)]
            sizes = [length * count for length, count in counts]
            outputs: list[torch.Tensor] = []
            maps: list[torch.Tensor | None] = []
            for (length, count), *states in zip(
                counts, *(part[0].split(sizes, dim=1) for part in (query, key, value)), strict=True
            ):
                batch = [part.unflatten(1, (count, length)).transpose(0, 1) for part in states]
                output, weights = attention(self, batch[0], batch[1], batch[2], None, **kwargs)
                outputs.append(output.flatten(0, 1))
                maps += [None] * count if weights is None else weights.split(1)
            attn_output = torch.cat(outputs).unsqueeze(0)
            # One map an image, since they differ in size.
            attn_weights = maps[0] if maps[0] is None or len(maps) == 1 else tuple(maps)
        return self.out_proj(attn_output[0]), attn_weights


class BagelVisionEncoderLayer(GradientCheckpointingLayer):
    """A SigLIP layer over packed images."""

    def __init__(self, config: BagelVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = BagelVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, lengths: tuple[int, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(patches, hidden)` -> `(patches, hidden)`; `lengths` are the patches of each image."""
        attn_output, _ = self.self_attn(self.layer_norm1(hidden_states), lengths, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class BagelVisionEmbeddings(nn.Module):
    """A linear patch embedding over `(row, column, channel)` values and a learned position table."""

    def __init__(self, config: BagelVisionConfig):
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`(patches, patch_dim)` -> `(patches, hidden)`."""
        embeddings = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        return embeddings + self.position_embedding(position_ids)


class BagelVisionEncoder(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: BagelVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([BagelVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, lengths: tuple[int, ...], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(patches, hidden)` -> `(patches, hidden)`."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, lengths, **kwargs)
        return hidden_states
