# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Who attends to whom in one forward: a layout is chosen once, and every decoder layer asks it to `attend`.

| layout | serves | source |
|---|---|---|
| [`MaskedAttention`] | a sequence under one mask of the library; text alone and decoding too | points 5 and 32 |
| [`BlockwiseAttention`] | one sample with images, where what a mask hides would be computed | point 5 |
| [`ChunkedAttention`] | flash attention, which takes no block mask | point 5 |
| [`SampleAttention`] | packed samples where there is no sparse mask for them | point 32 |
| [`DenoisingAttention`] | noised blocks, each against its own read-only prefix | point 7 |
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.generic import is_flash_attention_requested

from .cache import PrefixCache, PrefixLayer
from .configuration_bagel import BagelTextConfig
from .sequence import ExpertRouting, SequenceLayout, join_experts, split_experts


logger = logging.get_logger(__name__)

# Devices where flex attention has only its forward.
NO_FLEX_BACKWARD = ("cpu", "mps")

Routing: TypeAlias = ExpertRouting | None
# Queries, keys and values `(..., heads, head_dim)` of the tokens of each expert.
ExpertHeads: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
# Attended values `(..., heads * head_dim)` of the tokens of each expert, and the weights if they were asked for.
Attended: TypeAlias = tuple[Sequence[torch.Tensor], torch.Tensor | None]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    implementation: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The library's attention. `(batch, heads, tokens, head_dim)` three times -> `(batch, tokens, heads * head_dim)`."""
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation or module.config._attn_implementation, eager_attention_forward
    )
    dropout = module.attention_dropout if module.training else 0.0
    output, weights = interface(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **kwargs)
    return output.flatten(-2), weights


def _whole_sequence(routing: Routing, heads: ExpertHeads) -> list[torch.Tensor]:
    """Queries, keys and values of both experts in the order of the sequence, `(batch, tokens, heads, head_dim)`."""
    joined = [join_experts(states) for states in zip(*heads, strict=True)]
    return joined if routing is None else [routing.to_sequence(states) for states in joined]


def _with_past(routing: Routing, heads: ExpertHeads, cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of a sequence, and keys and values of it and its past, `(batch, heads, tokens, head_dim)`."""
    query, key, value = (states.transpose(1, 2) for states in _whole_sequence(routing, heads))
    return (query, key, value) if cache is None else (query, *cache.update(key, value))


def _of_experts(routing: Routing, sequence: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return split_experts(routing, sequence if routing is None else routing.to_expert_order(sequence))


class AttentionLayout:
    """Who attends to whom; see the module."""

    def layer(self, index: int) -> AttentionLayout:
        """What the decoder layer of that number is given."""
        return self

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        """
        Attention of one layer's tokens.

        Args:
            module (`BagelAttention`): The layer's attention.
            heads (`Sequence`): Of the tokens of each expert queries, keys and values `(..., heads, head_dim)`.
            routing (`ExpertRouting`, *optional*): Expert of each token.
            layer_cache (*optional*): What came before in this layer; its `update` adds the new tokens.
            kwargs: Of the attention function; the paged cache of continuous batching is one of them.
        """
        raise NotImplementedError


@dataclass
class MaskedAttention(AttentionLayout):
    """The whole sequence under one mask, in the format of the attention in use; `None` is causal."""

    mask: Any

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        query, key, value = _with_past(routing, heads, layer_cache)
        # A model may be spread over several devices, and the mask lies on one of them.
        mask = self.mask.to(query.device) if isinstance(self.mask, torch.Tensor) else self.mask
        output, weights = attention(module, query, key, value, mask, **kwargs)
        return _of_experts(routing, output), weights


@dataclass
class BlockwiseAttention(AttentionLayout):
    """
    Chunk by chunk, each against what it sees and nothing else: under one mask all would be computed, and then hidden.

    Attributes:
        chunks (`list[tuple[int, int, torch.BoolTensor | None]]`):
            Start, stop and mask of each; an image block needs none.
        past (`int`): Tokens that the cache holds already.
    """

    chunks: list[tuple[int, int, torch.Tensor | None]]
    past: int

    @classmethod
    def of(cls, layout: SequenceLayout, past: int, device: torch.device) -> BlockwiseAttention:
        """For a layout of one sample behind a past."""
        chunks: list[tuple[int, int, torch.Tensor | None]] = []
        for start, stop, is_block in layout.chunks():
            mask = None
            if not is_block:
                seen = torch.ones(stop - start, past + stop, dtype=torch.bool, device=device)
                mask = seen.tril(past + start)[None, None]
            chunks.append((start, stop, mask))
        return cls(chunks, past)

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        query, key, value = _with_past(routing, heads, layer_cache)
        outputs = []
        for start, stop, mask in self.chunks:
            seen = self.past + stop
            own_mask = None if mask is None else mask.to(query.device)
            states = query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen]
            outputs.append(attention(module, *states, own_mask, **(kwargs | {"is_causal": False}))[0])
        return _of_experts(routing, torch.cat(outputs, dim=1)), None


@dataclass
class ChunkedAttention(AttentionLayout):
    """Chunk by chunk: a text attends causally, an image block to everything before it and all of itself.

    Attributes:
        chunks (`list[tuple[int, int, bool]]`): Start, stop, and whether it is an image block; the same in all samples.
        past (`int`): Tokens that the cache holds already.
        padding (`torch.Tensor` of shape `(batch, past + tokens)`, *optional*): 0 at padding, which stands on the left.
    """

    chunks: list[tuple[int, int, bool]]
    past: int
    padding: torch.Tensor | None

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        query, key, value = _with_past(routing, heads, layer_cache)
        outputs = []
        for start, stop, is_block in self.chunks:
            seen = self.past + stop
            mask = None if self.padding is None else self.padding[:, :seen].to(query.device)
            output, _ = attention(
                module,
                query[:, :, start:stop],
                key[:, :, :seen],
                value[:, :, :seen],
                mask,
                **(kwargs | {"is_causal": not is_block}),
            )
            outputs.append(output)
        return _of_experts(routing, torch.cat(outputs, dim=1)), None


@dataclass
class SampleAttention(AttentionLayout):
    """Packed samples one by one: memory grows with the squares of the samples, not of the packed sequence.

    Attributes:
        samples (`list[tuple[int, int, torch.BoolTensor | None]]`): See [`SequenceLayout.sample_masks`].
    """

    samples: list[tuple[int, int, torch.Tensor | None]]

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        states = _whole_sequence(routing, heads)
        shape = states[0].shape[:2]
        # Padding, sample, padding, ..., sample, padding; most of the padding is empty.
        borders = [0, *(border for start, stop, _ in self.samples for border in (start, stop)), shape.numel()]
        lengths = [stop - start for start, stop in itertools.pairwise(borders)]
        query, key, value = (part.flatten(0, 1).split(lengths) for part in states)
        outputs = [torch.zeros_like(padding).flatten(-2) for padding in query]
        for index, (_, _, mask) in enumerate(self.samples):
            place = 2 * index + 1
            own = [part[place].transpose(0, 1).unsqueeze(0) for part in (query, key, value)]
            own_mask = None if mask is None else mask[None, None].to(own[0].device)
            output, _ = attention(module, own[0], own[1], own[2], own_mask, implementation="sdpa", **kwargs)
            outputs[place] = output[0]
        return _of_experts(routing, torch.cat(outputs).unflatten(0, shape)), None


@dataclass
class DenoisingAttention(AttentionLayout):
    """Noised blocks, each of which sees its own prefix and all of itself (point 7)."""

    prefix: PrefixCache | PrefixLayer

    def layer(self, index: int) -> DenoisingAttention:
        assert isinstance(self.prefix, PrefixCache)
        return DenoisingAttention(self.prefix.layer(index))

    def attend(self, module: Any, heads: ExpertHeads, routing: Routing, layer_cache: Any, **kwargs: Any) -> Attended:
        assert isinstance(self.prefix, PrefixLayer) and routing is not None
        markers, latents = [], []
        for index, pieces in enumerate(routing.block_slices()):
            query, key, value = (
                [states[piece] for states, piece in zip(of_experts, pieces, strict=True)]
                for of_experts in zip(*heads, strict=True)
            )
            block_key, block_value = self.prefix.extend(index, key, value)
            block_query = torch.cat(query).transpose(0, 1).unsqueeze(0)
            output, _ = attention(module, block_query, block_key, block_value, None, **(kwargs | {"is_causal": False}))
            markers.append(output[0, :2])
            latents.append(output[0, 2:])
        return (join_experts(markers), join_experts(latents)), None


def choose_attention(
    config: BagelTextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Cache | PrefixCache | None,
    layout: SequenceLayout | None,
) -> AttentionLayout:
    """
    The layout of a forward.

    Args:
        config (`BagelTextConfig`): Tells the attention in use.
        inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden)`): Of which shape, type and device are read.
        attention_mask (*optional*): 0 at padding, `(batch, past + tokens)`; or a mask in the attention's own format.
        cache (`Cache` or `PrefixCache`, *optional*): What came before.
        layout (`SequenceLayout`, *optional*): What the types of the tokens decide; `None` for text alone.

    Raises:
        ValueError: if the attention in use cannot express the layout.
    """
    if isinstance(cache, PrefixCache):
        return DenoisingAttention(cache)
    device = inputs_embeds.device
    if layout is None or not (layout.has_blocks or layout.is_packed):
        return MaskedAttention(create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids=None))
    past = 0 if cache is None else int(cache.get_seq_length())
    if layout.is_packed and past:
        raise ValueError("`document_ids` and noised `latents` inside a sequence cannot follow a filled cache.")
    if is_flash_attention_requested(config):
        if layout.is_packed:
            raise ValueError(
                "Flash attention takes no mask of `document_ids` or noised latents beside image blocks. Pass the "
                'samples one by one, or load the model with `attn_implementation="sdpa"`.'
            )
        padding = None if attention_mask is None or attention_mask.all() else attention_mask
        return ChunkedAttention(layout.chunks(), past, padding)
    if layout.document_ids is not None and not _has_sparse_mask(config, device):
        if cache is not None:
            raise ValueError("`document_ids` cannot be used with a cache. Leave out `past_key_values`.")
        return SampleAttention(
            [
                (start, stop, None if mask is None else mask.to(device, non_blocking=True))
                for start, stop, mask in layout.sample_masks()
            ]
        )
    is_alone = len(inputs_embeds) == 1 and attention_mask is None and not layout.is_packed
    if is_alone and config._attn_implementation == "sdpa" and not is_torchdynamo_compiling():
        return BlockwiseAttention.of(layout, past, device)
    mask = create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        cache,
        # Rope positions repeat inside a block: samples must not be guessed from them.
        position_ids=None,
        and_mask_function=layout.visibility(device) if layout.is_packed else None,
        block_sequence_ids=layout.block_ids(past).to(device, non_blocking=True),
    )
    return MaskedAttention(mask)


def _has_sparse_mask(config: BagelTextConfig, device: torch.device) -> bool:
    """Whether the attention has a sparse mask for packed samples."""
    if config._attn_implementation != "flex_attention":
        return False
    if device.type in NO_FLEX_BACKWARD and torch.is_grad_enabled() and not is_torchdynamo_compiling():
        logger.warning_once(
            f"Flex attention has no backward on {device.type}: packed samples are attended one by one."
        )
        return False
    return True
