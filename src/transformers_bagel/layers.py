# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The decoder layer: a Qwen2 layer whose tokens take one of two experts (original behaviour, points 4 and 28)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import AttentionLayout
from .configuration_bagel import BagelTextConfig
from .sequence import ExpertRouting, join_experts, route, split_experts


class BagelAttention(nn.Module):
    """Grouped-query attention over one sequence, whose tokens are projected by one of two experts each."""

    def __init__(self, config: BagelTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        for suffix, exists in (("", True), ("_moe_gen", config.visual_gen)):
            for name, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
                ("v_proj", config.num_key_value_heads),
            ):
                projection = nn.Linear(config.hidden_size, heads * self.head_dim) if exists else None
                self.add_module(name + suffix, projection)
            output = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
            self.add_module("o_proj" + suffix, output if exists else None)
            for name in ("q_norm", "k_norm"):
                norm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm and exists else None
                self.add_module(name + suffix, norm)

    def forward(
        self,
        expert_states: tuple[torch.Tensor, ...],
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        attention_layout: AttentionLayout,
        layer_cache: Any = None,
        routing: ExpertRouting | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Attention of the tokens of each expert, see [`BagelDecoderLayer`] and `split_experts`."""
        # Generation passes normalise and rotate in float32 (original behaviour, point 28).
        in_float32 = routing is not None
        heads = route(
            routing,
            list(zip(expert_states, position_embeddings, strict=True)),
            lambda und: self._heads(und[0], und[1], "", in_float32),
            lambda gen: self._heads(gen[0], gen[1], "_moe_gen", in_float32),
        )
        attended, attn_weights = attention_layout.attend(self, heads, routing, layer_cache, **kwargs)
        return route(routing, attended, self.o_proj, self.o_proj_moe_gen), attn_weights

    def _heads(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        expert: str,
        in_float32: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of one expert's tokens, normalised and rotated.

        `(..., hidden)` -> `(..., heads, head_dim)` three times, the last two with the key-value heads.
        """
        query, key, value = (
            getattr(self, name + expert)(hidden_states).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if in_float32:
            query, key = query.float(), key.float()
        if self.q_norm is not None:
            query, key = getattr(self, "q_norm" + expert)(query), getattr(self, "k_norm" + expert)(key)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=-2)
        return query.to(value.dtype), key.to(value.dtype), value


class BagelDecoderLayer(GradientCheckpointingLayer):
    """A Qwen2 layer with a second set of weights for the latent tokens."""

    # None in a model without `visual_gen`.
    mlp_moe_gen: Any
    input_layernorm_moe_gen: Any
    post_attention_layernorm_moe_gen: Any

    def __init__(self, config: BagelTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.self_attn = BagelAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_moe_gen = self.input_layernorm_moe_gen = self.post_attention_layernorm_moe_gen = None
        if config.visual_gen:
            self.mlp_moe_gen = Qwen2MLP(config)
            self.input_layernorm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_attention_layernorm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_layouts: Sequence[AttentionLayout],
        layer_caches: Sequence[Any],
        **kwargs: Any,
    ) -> torch.Tensor:
        """`forward` with this layer's part of what every layer is given: step caches call all of them with the same.

        The part is taken outside of `forward`, which would be compiled again for each number.
        """
        index = self.layer_idx
        own = {"attention_layout": attention_layouts[index], "layer_cache": layer_caches[index]}
        return super().__call__(hidden_states, **own, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        attention_layout: AttentionLayout,
        layer_cache: Any = None,
        routing: ExpertRouting | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        One layer over all tokens, those of each expert through its own weights.

        Args:
            hidden_states (`torch.Tensor`):
                `(batch, tokens, hidden)`; with a routing `(batch * tokens, hidden)`, in expert order.
            position_embeddings (`tuple[tuple[torch.Tensor, torch.Tensor], ...]`):
                Cosines and sines for the tokens of each expert, shaped like them.
            attention_layout (`AttentionLayout`): Who attends to whom in this layer.
            layer_cache (*optional*): What came before in this layer, see `layer_caches`.
            routing (`ExpertRouting`, *optional*): Expert of every token; without it all take the understanding expert.

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        states = split_experts(routing, hidden_states)
        attended, _ = self.self_attn(
            route(routing, states, self.input_layernorm, self.input_layernorm_moe_gen),
            position_embeddings=position_embeddings,
            attention_layout=attention_layout,
            layer_cache=layer_cache,
            routing=routing,
            **kwargs,
        )
        states = _add(states, attended)
        normed = route(routing, states, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return join_experts(_add(states, route(routing, normed, self.mlp, self.mlp_moe_gen)))


def run_in_turn(layers: Iterable[nn.Module], hidden_states: torch.Tensor, /, **given: Any) -> torch.Tensor:
    """Hidden states behind all layers, one after the other, each of which is given the same."""
    for layer in layers:
        hidden_states = layer(hidden_states, **given)
    return hidden_states


def in_residual_dtype(forward: Callable) -> Callable:
    """Let a model's `forward` take a `residual_dtype` other than that of its weights, in which its layers still compute."""

    @functools.wraps(forward)
    def called(self: Any, *args: Any, residual_dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if residual_dtype is None or residual_dtype == self.dtype:
            return forward(self, *args, **kwargs)
        with torch.autocast(self.device.type, self.dtype):
            return forward(self, *args, residual_dtype=residual_dtype, **kwargs)

    return called


def _add(states: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(own + other for own, other in zip(states, others, strict=True))
