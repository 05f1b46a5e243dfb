# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Caches: one that grows in place, a fork that copies nothing, and prefixes that a denoising step only reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import is_torchdynamo_compiling


# Tokens that a growing layer makes space for at a time. All of its tokens are copied once in so many.
GROWTH = 256


class GrowingLayer(DynamicLayer):
    """A [`DynamicLayer`] that writes new tokens into spare space of its own instead of copying all of them."""

    keys: Any
    values: Any

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.detach_buffer()

    def detach_buffer(self) -> None:
        """Stop using the spare space, which another cache may share; the next update copies first."""
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._filled: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`DynamicLayer.update`]. Returns views of shape `(batch, kv_heads, tokens, head_dim)`."""
        # Fall back to concatenation under autograd and torch.compile, and for the first tokens.
        if key_states.requires_grad or is_torchdynamo_compiling() or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._owns_buffers() or stop > self._buffers[0].shape[-2]:
            self._buffers = tuple(self._with_space(states, stop + GROWTH) for states in (self.keys, self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self._filled = tuple(buffer[:, :, :stop] for buffer in self._buffers)
        self.keys, self.values = self._filled
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """See [`DynamicLayer.crop`]. What comes next is written over what is left out."""
        owns_buffers = self._owns_buffers()
        super().crop(tokens_to_remove)
        if owns_buffers:
            self._filled = (self.keys, self.values)

    def _owns_buffers(self) -> bool:
        # Whatever else rebinds the tensors (beam search, cropping, offloading) does not know of the buffers.
        if not self._filled or self.keys is not self._filled[0] or self.values is not self._filled[1]:
            return False
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    @staticmethod
    def _with_space(states: torch.Tensor, tokens: int) -> torch.Tensor:
        buffer = states.new_empty(*states.shape[:2], tokens, states.shape[3])
        buffer[:, :, : states.shape[2]] = states
        return buffer


class GrowingCache(DynamicCache):
    """Unlike [`DynamicCache`], does not reallocate on every token.

    Args:
        config (`PreTrainedConfig`): Of the model, or of its text.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache that grows on its own from the state of `cache`, which stays as it is. No tensor is copied before.

    A [`DynamicLayer`] makes new tensors when it grows, and a [`GrowingLayer`] without a buffer copies its tokens first.

    Raises:
        TypeError: if the cache is of another kind.
    """
    if type(cache) not in (DynamicCache, GrowingCache):
        raise TypeError(f"Only a `DynamicCache` can be forked without a copy, got a `{type(cache).__name__}`.")
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fork.layers:
        if isinstance(layer, GrowingLayer):
            layer.detach_buffer()
    return fork


def level_cache(cache: DynamicCache, length: int | None = None) -> None:
    """Cut all layers to one length, by default that of the shortest: a forward may have written into the first alone."""
    if length is None:
        length = min(states.shape[-2] for layer in cache.layers for states in (layer.keys, layer.values))
    for layer in cache.layers:
        if not layer.keys.shape[-2] == layer.values.shape[-2] == length:
            # What comes next is not written into the spare space behind, which others may have seen filled.
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


@contextmanager
def kept_whole(cache: DynamicCache | None) -> Iterator[None]:
    """Whatever breaks off what is done with a cache, all of its layers hold the tokens that they held before."""
    length = 0 if cache is None else cache.get_seq_length()
    try:
        yield
    except BaseException:
        if cache is not None:
            level_cache(cache, length)
        raise


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache | None:
    """
    One cache of the samples of several, padded on the left with zeros, that grows on its own.

    Args:
        caches (`Sequence[DynamicCache]`): Of one sample each. A single one is not copied; without any, there is none.
    """
    if not caches:
        return None
    joined = fork_cache(caches[0])
    if len(caches) == 1:
        return joined
    longest = max(cache.get_seq_length() for cache in caches)
    for layer, *of_samples in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            states = [getattr(sample, name) for sample in of_samples]
            together = states[0].new_zeros(len(states), states[0].shape[1], longest, states[0].shape[3])
            for index, tokens in enumerate(states):
                together[index, :, longest - tokens.shape[2] :] = tokens[0]
            setattr(layer, name, together)
    return joined


def split_cache(cache: DynamicCache, starts: Sequence[int], lengths: Sequence[int]) -> list[DynamicCache]:
    """A cache of each sample, without its padding. No tensor is copied.

    Args:
        cache (`DynamicCache`): Of `len(lengths)` samples.
        starts (`Sequence[int]`): First token of each sample that is not padding.
        lengths (`Sequence[int]`): Tokens of each sample.
    """
    if len(lengths) == 1 and starts[0] == 0 and cache.get_seq_length() == lengths[0]:
        return [cache]
    return [
        cut_cache(cache, index, start, length)
        for index, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def cut_cache(cache: DynamicCache, index: int, start: int, length: int) -> DynamicCache:
    """A cache of some tokens of one sample. No tensor is copied."""
    own = fork_cache(cache)
    for layer in own.layers:
        layer.keys = layer.keys[index : index + 1, :, start : start + length]
        layer.values = layer.values[index : index + 1, :, start : start + length]
    return own


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """The same cache with tensors of its own, which hold nothing but its tokens."""
    copied = fork_cache(cache)
    for layer in copied.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return copied


def extend_cache(cache: DynamicCache, more: DynamicCache) -> DynamicCache:
    """A cache of the tokens of one, and then those of another."""
    extended = fork_cache(cache)
    for layer, own in zip(extended.layers, more.layers, strict=True):
        layer.keys = torch.cat([layer.keys, own.keys], dim=-2)
        layer.values = torch.cat([layer.values, own.values], dim=-2)
    return extended


@dataclass
class PrefixBuffer:
    """Keys and values of one prefix, per layer `(1, kv_heads, length + scratch, head_dim)`.

    Whoever attends to the prefix writes its own keys and values into the scratch space behind it first.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int

    @classmethod
    def from_cache(
        cls, cache: Cache, scratch: int, sample: int = 0, start: int = 0, common: int | None = None
    ) -> PrefixBuffer:
        """Copy one sample of a cache, once, into a buffer with scratch space.

        Args:
            cache (`Cache`): The filled cache.
            scratch (`int`): Tokens of the longest block that will be denoised against this prefix.
            sample (`int`): Place in the cache's batch.
            start (`int`): First token of the sample that is not padding.
            common (`int`, *optional*):
                Number of tokens, from `start`, to put last, so that a branch can attend to them alone. The order of
                keys is free, since each carries its rope position.

        Raises:
            TypeError: if the cache does not hold plain keys and values.
        """
        if not all(isinstance(layer, (DynamicLayer, StaticLayer)) for layer in cache.layers):
            raise TypeError(
                f"`past_key_values` must hold plain keys and values to be drawn from, got a `{type(cache).__name__}` of "
                f"`{type(cache.layers[0]).__name__}`. Pass a `DynamicCache`."
            )
        length = int(cache.get_seq_length()) - start
        common = length if common is None else common

        def place(states: torch.Tensor) -> torch.Tensor:
            states = states[sample : sample + 1, :, start : start + length]
            buffer = states.new_empty(*states.shape[:2], length + scratch, states.shape[3])
            buffer[:, :, : length - common] = states[:, :, common:]
            buffer[:, :, length - common : length] = states[:, :, :common]
            return buffer

        return cls(
            [place(layer.keys) for layer in cache.layers], [place(layer.values) for layer in cache.layers], length
        )


@dataclass
class PrefixView:
    """What one branch attends to: the part of a buffer from `start` on.

    `start=buffer.length` is the empty prefix with the scratch space of that buffer; `buffer=None` has no space at all.
    """

    buffer: PrefixBuffer | None
    start: int = 0


@dataclass
class PrefixLayer:
    """One layer of a [`PrefixCache`].

    Attributes:
        views (`list`):
            Of each branch the keys and values of its buffer (`None` without one), the first token that it attends to,
            and the first token of the scratch space.
    """

    views: list[tuple[tuple[torch.Tensor, torch.Tensor] | None, int, int]]

    def extend(
        self, branch: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix of a branch followed by new tokens.

        Without gradients the new tokens are written into the scratch space, and the views returned hold until the next
        call. With gradients everything is concatenated, since autograd needs tensors that nobody writes into.

        Args:
            branch (`int`): Place in the cache.
            keys (`Sequence[torch.Tensor]`): Pieces of shape `(tokens, kv_heads, head_dim)`.
            values (`Sequence[torch.Tensor]`): Likewise.

        Returns:
            Keys and values of shape `(1, kv_heads, prefix + tokens, head_dim)`.
        """
        states, first, scratch = self.views[branch]
        is_functional = torch.is_grad_enabled() and (
            keys[0].requires_grad or (states is not None and states[0].requires_grad)
        )
        extended = []
        for place, pieces in enumerate((keys, values)):
            if states is None or is_functional:
                parts = [piece.transpose(0, 1).unsqueeze(0) for piece in pieces]
                prefix = [] if states is None else [states[place][:, :, first:scratch]]
                extended.append(torch.cat([*prefix, *parts], dim=2))
                continue
            buffer, stop = states[place], scratch
            for piece in pieces:
                buffer[0, :, stop : stop + piece.shape[0]] = piece.transpose(0, 1)
                stop += piece.shape[0]
            extended.append(buffer[:, :, first:stop])
        return extended[0], extended[1]


class PrefixCache:
    """What a batch of noised blocks attends to: one view of a prefix for each, none of which grows.

    Views may share a buffer, also its scratch space, because the blocks of a layer are attended one after the other.

    Args:
        views (`Sequence[PrefixView]`): One for each block of the batch, in the order of the blocks.
    """

    def __init__(self, views: Sequence[PrefixView]):
        self.views = list(views)
        self._made: tuple[Any, Any] | None = None

    def get_or_create(self, key: Any, create: Callable[[], Any]) -> Any:
        """What `create` returned at the last call with this key, so that the steps of a denoising share it."""
        if self._made is None or self._made[0] != key:
            self._made = (key, create())
        return self._made[1]

    def __len__(self) -> int:
        return len(self.views)

    def select(self, indices: Sequence[int]) -> PrefixCache:
        """The cache of some of the blocks. Nothing is copied."""
        return PrefixCache([self.views[index] for index in indices])

    def layer(self, index: int) -> PrefixLayer:
        """What one decoder layer attends to, as views."""
        views = []
        for view in self.views:
            buffer = view.buffer
            states = None if buffer is None else (buffer.keys[index], buffer.values[index])
            views.append((states, view.start, 0 if buffer is None else buffer.length))
        return PrefixLayer(views)

    @classmethod
    def from_cache(cls, cache: Cache, scratch: int, attention_mask: torch.Tensor | None = None) -> PrefixCache:
        """One view for each sample of a filled cache; left padding is left out.

        Args:
            cache (`Cache`): The filled cache.
            scratch (`int`): Tokens of the longest block.
            attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at padding.
        """
        batch = cache.layers[0].keys.shape[0]
        padding = [0] * batch
        if attention_mask is not None:
            padding = (attention_mask[:, : cache.get_seq_length()] == 0).sum(-1).tolist()
        buffers = [PrefixBuffer.from_cache(cache, scratch, index, padding[index]) for index in range(batch)]
        return cls([PrefixView(buffer) for buffer in buffers])


@dataclass
class NumberedLayer:
    """One layer of a library's cache that must know which one it is, since it moves its layers or makes them late."""

    cache: Cache
    index: int

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Cache.update`]."""
        return self.cache.update(key_states, value_states, self.index)


def layer_caches(cache: Cache | None, num_layers: int) -> list[Any]:
    """What each decoder layer reads and writes: something with `update`, or `None`.

    A decoder layer that took its part out of the cache by its number would be compiled again for each number.
    """
    if cache is None:
        return [None] * num_layers
    if type(cache).update is Cache.update and not cache.offloading and len(cache) >= num_layers:
        return cache.layers[:num_layers]
    return [NumberedLayer(cache, index) for index in range(num_layers)]


def check_equal_lengths(layers: Sequence[Any]) -> None:
    """
    Refuse what [`layer_caches`] gave if not all of the layers have written into it.

    Raises:
        ValueError: if some layers have seen fewer tokens than others.
    """
    if is_torchdynamo_compiling():
        return
    lengths = {layer.get_seq_length() for layer in layers if isinstance(layer, DynamicLayer)} - {0}
    if len(lengths) > 1:
        raise ValueError(
            f"Some layers were left out while the model read: their caches hold {sorted(lengths)} tokens. A step cache may "
            "begin when the denoising does: raise its number of warm-up steps by the forwards before."
        )


__all__ = ["GrowingCache", "PrefixBuffer", "PrefixCache", "PrefixView", "fork_cache"]
