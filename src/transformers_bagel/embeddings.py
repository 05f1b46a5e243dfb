# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The layers between images and tokens: connector, timesteps, position tables, velocities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_bagel import BagelConfig


class BagelConnector(nn.Module):
    """Two-layer projection of ViT features to the language model's width."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        vision_config: Any = config.vision_config
        hidden_size = config.get_text_config().hidden_size
        self.fc1 = nn.Linear(vision_config.hidden_size, hidden_size)
        self.activation_fn = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(patches, vision_hidden)` -> `(patches, hidden)`."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def timestep_frequencies(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Cosines, then sines, of raw timesteps in [0, 1]; longest period 1e4 (original behaviour, point 12).

    `(images,)` -> `(images, dim)`, float32.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(1e4) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class BagelTimestepEmbedder(nn.Module):
    """Two-layer projection of the sinusoids of a timestep."""

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.frequency_embedding_size = config.frequency_embedding_size
        hidden_size = config.get_text_config().hidden_size
        self.linear_1 = nn.Linear(config.frequency_embedding_size, hidden_size)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`(images,)` in [0, 1] -> `(images, hidden)`."""
        frequencies = timestep_frequencies(timesteps, self.frequency_embedding_size)
        return self.linear_2(self.act(self.linear_1(frequencies.to(self.linear_1.weight.dtype))))


def sincos_table(side: int, hidden_size: int) -> torch.Tensor:
    """2-D sinusoids of a grid, `(side * side, hidden_size)`; the first half of each tells the column (point 10).

    Made on the CPU, since not every device has float64.
    """
    quarter = hidden_size // 4
    omega = 1e4 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    places = torch.arange(side, device="cpu")
    row, column = torch.meshgrid(places, places, indexing="ij")
    angles = torch.stack([column, row], dim=-1).reshape(-1, 2, 1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


class BagelPositionEmbedding(nn.Module):
    """A frozen table of `side * side` positions."""

    def __init__(self, side: int, hidden_size: int):
        super().__init__()
        self.side = side
        self.hidden_size = hidden_size
        # A buffer, because `from_pretrained` would make a frozen parameter trainable.
        self.pos_embed = nn.Buffer(sincos_table(side, hidden_size).to(torch.get_default_dtype()))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`(tokens,)` -> `(tokens, hidden)`."""
        return self.pos_embed[position_ids.to(self.pos_embed.device)]


class BagelVelocityHead(nn.Linear):
    """Projection of a latent token to its velocity, which starts at zero in a new model (point 37)."""
