# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What BAGEL's passes cost, from the configuration and the numbers of tokens: operations, bytes, and from both, seconds.

An operation is a floating-point multiplication or addition. Counted are the linear layers and the attention, as
`torch.utils.flop_counter` counts them; norms, rotations and activations are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers_bagel import BagelConfig


@dataclass(frozen=True)
class Cost:
    """
    Operations and bytes of a pass.

    Attributes:
        products (`float`): Operations of linear layers.
        attention (`float`): Operations of scores and of sums weighted by them.
        weight_bytes (`float`): Weights of linear layers, each read once.
        cache_bytes (`float`): Keys and values that were there before, each read once.
    """

    products: float = 0
    attention: float = 0
    weight_bytes: float = 0
    cache_bytes: float = 0

    @property
    def operations(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.products + other.products,
            self.attention + other.attention,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
        )

    def times(self, count: float) -> Cost:
        """The cost of several of them, one after the other."""
        return Cost(count * self.products, count * self.attention, count * self.weight_bytes, count * self.cache_bytes)


@dataclass(frozen=True)
class Rates:
    """
    What a machine reaches.

    Attributes:
        products (`float`): Operations a second of matrix products.
        attention (`float`): Operations a second of attention.
        bandwidth (`float`): Bytes a second read from memory.
    """

    products: float
    attention: float
    bandwidth: float


def product_seconds(cost: Cost, rates: Rates) -> float:
    """Seconds of the linear layers, which compute or wait for their weights."""
    return max(cost.products / rates.products, cost.weight_bytes / rates.bandwidth)


def attention_seconds(cost: Cost, rates: Rates) -> float:
    """Seconds of the attention, which computes or waits for the cache."""
    return max(cost.attention / rates.attention, cost.cache_bytes / rates.bandwidth)


def seconds(cost: Cost, rates: Rates) -> float:
    """Seconds of a pass, if nothing but linear layers and attention took time."""
    return product_seconds(cost, rates) + attention_seconds(cost, rates)


def products_per_token(config: BagelConfig) -> int:
    """Operations of one expert's linear layers for a token: twice the number of their weights."""
    text = config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    projections = 2 * (text.num_attention_heads + text.num_key_value_heads) * head_dim
    return 2 * text.num_hidden_layers * text.hidden_size * (projections + 3 * text.intermediate_size)


def operations_per_pair(config: BagelConfig) -> int:
    """Operations of the attention for a query and a key that it sees: two products in each head of each layer."""
    text = config.get_text_config()
    return 4 * text.num_hidden_layers * text.hidden_size


def head_products(config: BagelConfig) -> int:
    """Operations of the text head for a token."""
    text = config.get_text_config()
    return 2 * text.hidden_size * text.vocab_size


def latent_products(config: BagelConfig) -> int:
    """Operations of the layers around the latents for a token: into the model, and out of it."""
    return 2 * 2 * config.latent_dim * config.get_text_config().hidden_size


def time_products(config: BagelConfig) -> int:
    """Operations of the time embedder for an image."""
    hidden_size = config.get_text_config().hidden_size
    return 2 * hidden_size * (config.frequency_embedding_size + hidden_size)


def cache_bytes_per_token(config: BagelConfig, itemsize: int) -> int:
    """Bytes of the keys and values of a token."""
    text = config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * itemsize


def causal_pairs(tokens: int, prefix: int = 0) -> int:
    """Queries times keys of a text behind a prefix. A kernel skips what a token does not see."""
    return tokens * prefix + tokens * (tokens + 1) // 2


def denoise(config: BagelConfig, latents: Sequence[int], prefixes: Sequence[int], itemsize: int) -> Cost:
    """
    A denoising step.

    Args:
        config (`BagelConfig`)
        latents (`Sequence[int]`): Latent tokens of each block; a block is an image in one of its guidance branches.
        prefixes (`Sequence[int]`): Tokens that each block attends to beside itself.
        itemsize (`int`): Bytes of a number.
    """
    blocks = [length + 2 for length in latents]
    pairs = sum(block * (block + prefix) for block, prefix in zip(blocks, prefixes, strict=True))
    products = sum(blocks) * products_per_token(config)
    products += sum(latents) * latent_products(config) + len(blocks) * time_products(config)
    return Cost(
        products,
        pairs * operations_per_pair(config),
        # Latents take one expert, their two markers the other.
        2 * products_per_token(config) // 2 * itemsize,
        sum(prefixes) * cache_bytes_per_token(config, itemsize),
    )


def prefill(config: BagelConfig, tokens: int, pairs: int, itemsize: int, scored: int = 1) -> Cost:
    """
    A pass that fills the cache.

    Args:
        config (`BagelConfig`)
        tokens (`int`): Of all samples.
        pairs (`int`): Queries times the keys that they see, see `causal_pairs`.
        itemsize (`int`): Bytes of a number.
        scored (`int`, *optional*, defaults to 1): Tokens that the text head scores.
    """
    return Cost(
        tokens * products_per_token(config) + scored * head_products(config),
        pairs * operations_per_pair(config),
        (products_per_token(config) + head_products(config)) // 2 * itemsize,
    )


def decode(config: BagelConfig, prefix: int, batch: int, itemsize: int) -> Cost:
    """A step of `generate()`: one token of each sample of a batch, behind `prefix` tokens."""
    step = prefill(config, batch, batch * (prefix + 1), itemsize, scored=batch)
    return step + Cost(cache_bytes=batch * prefix * cache_bytes_per_token(config, itemsize))


def training(config: BagelConfig, texts: int, latents: int, targets: int, pairs: int) -> Cost:
    """
    Forward and backward of packed samples, without recomputation and without the optimizer.

    Args:
        config (`BagelConfig`)
        texts (`int`): Tokens of the understanding expert.
        latents (`int`): Tokens of one noised image.
        targets (`int`): Text tokens that are predicted.
        pairs (`int`): Queries times keys, sample by sample: a mask skips none.
    """
    forward = (texts + latents) * products_per_token(config) + targets * head_products(config)
    forward += latents * latent_products(config) + time_products(config)
    # A product has two in its backward, or one where what comes in is no activation.
    inputs = latents * config.latent_dim + config.frequency_embedding_size
    products = 3 * forward - 2 * inputs * config.get_text_config().hidden_size
    # An attention has four beside the scores, which a fused kernel computes again.
    return Cost(products, 3.5 * pairs * operations_per_pair(config))


def vision(config: BagelConfig, patches: int) -> Cost:
    """The tower that sees, on the patches of one image, with the connector behind it."""
    tower: Any = config.vision_config
    hidden_size = config.get_text_config().hidden_size
    layer = tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
    embedding = tower.num_channels * tower.patch_size**2 * tower.hidden_size
    connector = hidden_size * (tower.hidden_size + hidden_size)
    return Cost(
        2 * patches * (tower.num_hidden_layers * layer + embedding + connector),
        4 * tower.num_hidden_layers * tower.hidden_size * patches**2,
    )


def tokens_of_equal_cost(config: BagelConfig) -> float:
    """Keys at which the attention of a token takes as many operations as its linear layers."""
    return products_per_token(config) / operations_per_pair(config)
