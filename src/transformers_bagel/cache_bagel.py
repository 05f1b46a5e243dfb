# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Caches for drawing: a fork that copies nothing, and prefixes that a denoising step reads without growing them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own from the state of `cache`, which stays as it is. No tensor is copied.

    This rests on [`DynamicCache`] appending by concatenation: it rebinds its tensors and never writes into them.
    """
    if type(cache) is not DynamicCache:
        raise TypeError(f"Only a `DynamicCache` can be forked without a copy, got a `{type(cache).__name__}`.")
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


@dataclass
class PrefixBuffer:
    """Keys and values of one prefix, per layer `(1, kv_heads, length + room, head_dim)`, with room behind it.

    The room is scratch space: whoever attends writes its own keys and values there first.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int

    @classmethod
    def from_cache(
        cls, cache: Cache, room: int, row: int = 0, start: int = 0, common: int | None = None
    ) -> PrefixBuffer:
        """Copy one row of a cache, once, into a buffer with `room` more places.

        Args:
            cache (`Cache`): The filled cache.
            room (`int`): Tokens of the longest block that will be denoised against this prefix.
            row (`int`): Row of the cache's batch.
            start (`int`): First token of the row that is not padding.
            common (`int`, *optional*):
                How many tokens, from `start`, are to stand last, so that a lane can attend to them alone. The order
                of keys is free, since each carries its rope position.
        """
        if not all(isinstance(layer, (DynamicLayer, StaticLayer)) for layer in cache.layers):
            raise TypeError(
                f"`past_key_values` must hold plain keys and values to be drawn from, got a `{type(cache).__name__}` of "
                f"`{type(cache.layers[0]).__name__}`. Pass a `DynamicCache`."
            )
        length = int(cache.get_seq_length()) - start
        common = length if common is None else common

        def place(states: torch.Tensor) -> torch.Tensor:
            states = states[row : row + 1, :, start : start + length]
            buffer = states.new_empty(*states.shape[:2], length + room, states.shape[3])
            buffer[:, :, : length - common] = states[:, :, common:]
            buffer[:, :, length - common : length] = states[:, :, :common]
            return buffer

        return cls(
            [place(layer.keys) for layer in cache.layers], [place(layer.values) for layer in cache.layers], length
        )


@dataclass
class PrefixLane:
    """One block of a denoising batch: the part of a buffer, from `start` on, that it attends to.

    `start=buffer.length` is the empty prefix in the scratch space of that buffer; `buffer=None` has no space at all.
    """

    buffer: PrefixBuffer | None
    start: int = 0


class PrefixCache:
    """What a batch of noised blocks attends to: one lane a block, none of which grows.

    Lanes may share a buffer, also its scratch space, because the lanes of a layer are attended one after the other.

    Args:
        lanes (`Sequence[PrefixLane]`): One lane for each block of the batch, in the order of the blocks.
    """

    def __init__(self, lanes: Sequence[PrefixLane]):
        self.lanes = list(lanes)

    def __len__(self) -> int:
        return len(self.lanes)

    def select(self, indices: Sequence[int]) -> PrefixCache:
        """The cache of some of the lanes. Nothing is copied."""
        return PrefixCache([self.lanes[index] for index in indices])

    def extend(
        self, layer_idx: int, lane_idx: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix of a lane followed by the given pieces, as views that hold until the next call for this layer.

        Args:
            layer_idx (`int`): Decoder layer.
            lane_idx (`int`): Lane.
            keys (`Sequence[torch.Tensor]`): Pieces of shape `(tokens, kv_heads, head_dim)`, written in a row.
            values (`Sequence[torch.Tensor]`): Likewise.

        Returns:
            Keys and values of shape `(1, kv_heads, prefix + tokens, head_dim)`.
        """
        lane = self.lanes[lane_idx]
        if lane.buffer is None:
            key, value = (torch.cat(list(pieces)).transpose(0, 1).unsqueeze(0) for pieces in (keys, values))
            return key, value
        views = []
        for buffer, pieces in ((lane.buffer.keys[layer_idx], keys), (lane.buffer.values[layer_idx], values)):
            stop = lane.buffer.length
            for piece in pieces:
                buffer[0, :, stop : stop + piece.shape[0]] = piece.transpose(0, 1)
                stop += piece.shape[0]
            views.append(buffer[:, :, lane.start : stop])
        return views[0], views[1]

    @classmethod
    def from_cache(cls, cache: Cache, room: int, attention_mask: torch.Tensor | None = None) -> PrefixCache:
        """One lane for each row of a filled cache; left padding is left out.

        Args:
            cache (`Cache`): The filled cache.
            room (`int`): Tokens of the longest block.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at padding.
        """
        batch = cache.layers[0].keys.shape[0]
        padding = [0] * batch
        if attention_mask is not None:
            padding = (attention_mask[:, : cache.get_seq_length()] == 0).sum(-1).tolist()
        return cls([PrefixLane(PrefixBuffer.from_cache(cache, room, row, padding[row])) for row in range(batch)])


__all__ = ["PrefixBuffer", "PrefixCache", "PrefixLane", "fork_cache"]
