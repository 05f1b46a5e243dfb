# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Caches: one that grows in place, a fork that copies nothing, and prefixes that a denoising step reads only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import is_torchdynamo_compiling


# Places that a growing layer makes at a time. All of its tokens are copied once in so many.
GROWTH = 256


class GrowingLayer(DynamicLayer):
    """A [`DynamicLayer`] with room behind its tokens: the next ones are written there, and not into a copy of all."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.forget_room()

    def forget_room(self) -> None:
        """Leave the room to whoever else reads these tokens, and copy them before the next ones come."""
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._filled: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`DynamicLayer.update`]. What is returned are views of shape `(batch, kv_heads, tokens, head_dim)`."""
        # Autograd needs tensors that nobody writes into, a graph cannot depend on who owns one, and the first tokens may
        # be the only ones.
        if key_states.requires_grad or is_torchdynamo_compiling() or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._owns_room() or stop > self._buffers[0].shape[-2]:
            self._buffers = tuple(self._with_room(states, stop + GROWTH) for states in (self.keys, self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self._filled = tuple(buffer[:, :, :stop] for buffer in self._buffers)
        self.keys, self.values = self._filled
        return self.keys, self.values

    def _owns_room(self) -> bool:
        # Whatever else rebinds the tensors (beam search, cropping, offloading) does not know of the buffers.
        if not self._filled or self.keys is not self._filled[0] or self.values is not self._filled[1]:
            return False
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    @staticmethod
    def _with_room(states: torch.Tensor, places: int) -> torch.Tensor:
        buffer = states.new_empty(*states.shape[:2], places, states.shape[3])
        buffer[:, :, : states.shape[2]] = states
        return buffer


class GrowingCache(DynamicCache):
    """A [`DynamicCache`] whose layers grow in place; that copies all of its tokens at every new one.

    Args:
        config (`PreTrainedConfig`): Of the model, or of its text.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own from the state of `cache`, which stays as it is. No tensor is copied before.

    This rests on what each layer does to grow: a [`DynamicLayer`] makes new tensors, and a [`GrowingLayer`] without
    room copies its tokens first.
    """
    if type(cache) not in (DynamicCache, GrowingCache):
        raise TypeError(f"Only a `DynamicCache` can be forked without a copy, got a `{type(cache).__name__}`.")
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fork.layers:
        if isinstance(layer, GrowingLayer):
            layer.forget_room()
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


@dataclass
class PrefixLayer:
    """One layer of a [`PrefixCache`].

    Attributes:
        lanes (`list`):
            Of each lane the keys and values of its buffer (`None` if it has none), the first place that it attends to,
            and the first place of the room.
    """

    lanes: list[tuple[tuple[torch.Tensor, torch.Tensor] | None, int, int]]

    def extend(
        self, lane_idx: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prefix of a lane followed by the given pieces, as views that hold until the next call.

        Args:
            lane_idx (`int`): Lane.
            keys (`Sequence[torch.Tensor]`): Pieces of shape `(tokens, kv_heads, head_dim)`, written in a row.
            values (`Sequence[torch.Tensor]`): Likewise.

        Returns:
            Keys and values of shape `(1, kv_heads, prefix + tokens, head_dim)`.
        """
        states, first, room = self.lanes[lane_idx]
        if states is None:
            key, value = (torch.cat(list(pieces)).transpose(0, 1).unsqueeze(0) for pieces in (keys, values))
            return key, value
        views = []
        for buffer, pieces in zip(states, (keys, values), strict=True):
            stop = room
            for piece in pieces:
                buffer[0, :, stop : stop + piece.shape[0]] = piece.transpose(0, 1)
                stop += piece.shape[0]
            views.append(buffer[:, :, first:stop])
        return views[0], views[1]


@dataclass
class CacheLayer:
    """One layer of a library's cache that must know which one it is, since it moves its layers or makes them late."""

    cache: Cache
    index: int

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Cache.update`]."""
        return self.cache.update(key_states, value_states, self.index)


def layer_caches(cache: Cache | PrefixCache | None, num_layers: int) -> list[Any]:
    """What each decoder layer reads and writes: something with `update`, a [`PrefixLayer`], or `None`.

    A layer that took its own out of the cache by its number would be compiled again for each number.
    """
    if cache is None:
        return [None] * num_layers
    if isinstance(cache, PrefixCache):
        return [cache.layer(index) for index in range(num_layers)]
    if type(cache).update is Cache.update and not cache.offloading and len(cache) >= num_layers:
        return cache.layers[:num_layers]
    return [CacheLayer(cache, index) for index in range(num_layers)]


class PrefixCache:
    """What a batch of noised blocks attends to: one lane a block, none of which grows.

    Lanes may share a buffer, also its scratch space, because the lanes of a layer are attended one after the other.

    Args:
        lanes (`Sequence[PrefixLane]`): One lane for each block of the batch, in the order of the blocks.
    """

    def __init__(self, lanes: Sequence[PrefixLane]):
        self.lanes = list(lanes)
        self._made: tuple[Any, Any] | None = None

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned at the last call with this key: what the steps of a denoising share is made once."""
        if self._made is None or self._made[0] != key:
            self._made = (key, make())
        return self._made[1]

    def __len__(self) -> int:
        return len(self.lanes)

    def select(self, indices: Sequence[int]) -> PrefixCache:
        """The cache of some of the lanes. Nothing is copied."""
        return PrefixCache([self.lanes[index] for index in indices])

    def layer(self, index: int) -> PrefixLayer:
        """What one decoder layer attends to, as views."""
        lanes = []
        for lane in self.lanes:
            buffer = lane.buffer
            states = None if buffer is None else (buffer.keys[index], buffer.values[index])
            lanes.append((states, lane.start, 0 if buffer is None else buffer.length))
        return PrefixLayer(lanes)

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


__all__ = ["GrowingCache", "PrefixBuffer", "PrefixCache", "PrefixLane", "fork_cache"]
