# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL: a Qwen2 language model whose every layer has a second expert for image latents, and a SigLIP tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, is_torchdynamo_compiling, logging
from transformers.utils.generic import (
    can_return_tuple,
    get_max_seqlen,
    is_flash_attention_requested,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from .adapters import BagelAdapterMixin
from .cache import CacheLayer, GrowingCache, PrefixCache, PrefixLane, PrefixLayer, layer_caches
from .checkpoint_bagel import check_checkpoint_files, ignored_weights, rename_published_weights
from .configuration_bagel import BagelConfig, BagelTextConfig, BagelVisionConfig
from .context_parallel import SplitPrefixCache
from .generation_bagel import BagelGenerationMixin
from .memory_bagel import OFFLOAD_BLOCKS, SENSITIVE_MODULES, unpackable_modules
from .safetensors_bagel import tensors_to_convert
from .sequence import (
    IMAGE_TOKEN,
    LATENT_TOKEN,
    TEXT_TOKEN,
    Routing,
    SampleMasks,
    SequenceLayout,
    check_placeholders,
    join_parts,
    patch_grid_ids,
    rope_positions,
    route,
    split_experts,
    token_types_from_ids,
)
from .training.losses import (
    IGNORED_LABEL,
    cross_entropy_sum,
    flow_matching_sum,
    latent_weights,
    over_ranks,
    text_targets,
)


logger = logging.get_logger(__name__)

# Devices where flex attention has only its forward.
NO_FLEX_BACKWARD = ("cpu", "mps")

# Names of the weights of each part of a `BagelForConditionalGeneration`.
TOWERS = {
    "vit": r"model\.vision_tower\.",
    "connector": r"model\.connector\.",
    "und": r"model\.language_model\.(?!.*_moe_gen)|lm_head\.",
    "gen": r"model\.language_model\..*_moe_gen|model\.(vae2llm|llm2vae|time_embedder)\.",
}


@dataclass
class BagelModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`BagelTextModel`] and [`BagelModel`].

    Args:
        velocity (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`, *optional*):
            Flow from data to noise at every latent token, packed like `latents`.
        latent_hidden_states (`torch.FloatTensor` of shape `(latent_tokens, hidden_size)`, *optional*):
            Output of the last layer at the latent tokens, before the final norm.
    """

    velocity: torch.FloatTensor | None = None
    latent_hidden_states: torch.FloatTensor | None = None


@dataclass
class BagelOutput(ModelOutput):
    r"""
    Output of [`BagelForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            `ce_loss` and `mse_loss`, weighted by `config.ce_weight` and `config.mse_weight`.
        ce_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy, mean over the text targets as `config.loss_reduction` says.
        mse_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Squared error of the velocity, mean over the numbers of the noised latent tokens, likewise.
        logits (`torch.FloatTensor` of shape `(batch, tokens, vocab_size)`, *optional*):
            Scores of the next token. `None` when only latents were passed, or with `skip_logits`.
        velocity (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`, *optional*):
            Flow from data to noise at every latent token, packed like `latents`.
        latent_hidden_states (`torch.FloatTensor` of shape `(latent_tokens, hidden_size)`, *optional*):
            Output of the last layer at the latent tokens, before the final norm.
        past_key_values (`Cache`, *optional*): Keys and values of the sequence so far.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): Of each layer, with `output_hidden_states=True`.
        attentions (`tuple[torch.FloatTensor]`, *optional*): Of each layer, with `output_attentions=True`.
    """

    loss: torch.FloatTensor | None = None
    ce_loss: torch.FloatTensor | None = None
    mse_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    latent_hidden_states: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None


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
        parts: tuple[torch.Tensor, ...],
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        attention_mask: torch.Tensor | SampleMasks | None = None,
        past_key_values: CacheLayerMixin | CacheLayer | PrefixLayer | None = None,
        routing: Routing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Attention of the tokens of each expert, see [`BagelDecoderLayer`] and `split_experts`."""
        # Generation passes normalise and rotate in float32 (published behaviour, point 28).
        in_float32 = routing is not None
        heads = route(
            routing,
            list(zip(parts, position_embeddings, strict=True)),
            lambda part: self._heads(part[0], part[1], "", in_float32),
            lambda part: self._heads(part[0], part[1], "_moe_gen", in_float32),
        )
        attn_weights = None
        if isinstance(past_key_values, PrefixLayer) and routing is not None:
            attn_output = self._attend_blocks(heads, past_key_values, routing, **kwargs)
        elif isinstance(attention_mask, SampleMasks):
            attn_output = self._attend_samples(heads, attention_mask, routing, **kwargs)
        else:
            attn_output, attn_weights = self._attend_sequence(
                heads, attention_mask, past_key_values, routing, **kwargs
            )
        return route(routing, attn_output, self.o_proj, self.o_proj_moe_gen), attn_weights

    def _heads(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        expert: str,
        in_float32: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of one expert's tokens, `(..., heads, head_dim)`, normalised and rotated."""
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

    def _attend_sequence(
        self,
        heads: tuple[tuple[torch.Tensor, ...], ...],
        attention_mask: torch.Tensor | None,
        past_key_values: CacheLayerMixin | CacheLayer | None,
        routing: Routing | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        query, key, value = (states.transpose(1, 2) for states in _whole_sequence(routing, heads))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value)
        attn_output, attn_weights = self._attention(query, key, value, attention_mask, **kwargs)
        return _parts_of_sequence(routing, attn_output), attn_weights

    def _attend_blocks(
        self,
        heads: tuple[tuple[torch.Tensor, ...], ...],
        past_key_values: PrefixLayer,
        routing: Routing,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        markers, latents = [], []
        for lane_idx, pieces in enumerate(routing.block_slices()):
            query, key, value = (
                [states[piece] for states, piece in zip(of_experts, pieces, strict=True)]
                for of_experts in zip(*heads, strict=True)
            )
            lane_key, lane_value = past_key_values.extend(lane_idx, key, value)
            lane_query = torch.cat(query).transpose(0, 1).unsqueeze(0)
            lane_output, _ = self._attention(lane_query, lane_key, lane_value, None, **kwargs)
            markers.append(lane_output[0, :2])
            latents.append(lane_output[0, 2:])
        return join_parts(markers), join_parts(latents)

    def _attend_samples(
        self,
        heads: tuple[tuple[torch.Tensor, ...], ...],
        sample_masks: SampleMasks,
        routing: Routing | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        def attention(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            heads = [part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)]
            mask = None if mask is None else mask[None, None]
            attn_output, _ = self._attention(heads[0], heads[1], heads[2], mask, implementation="sdpa", **kwargs)
            return attn_output.view_as(query)

        attn_output = sample_masks.attend(attention, *_whole_sequence(routing, heads)).flatten(-2)
        return _parts_of_sequence(routing, attn_output)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        implementation: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attn_output.flatten(-2), attn_weights


class BagelDecoderLayer(GradientCheckpointingLayer):
    """A Qwen2 layer with a second set of weights for the latent tokens."""

    # None in a model without its drawing half.
    mlp_moe_gen: Any
    input_layernorm_moe_gen: Any
    post_attention_layernorm_moe_gen: Any

    def __init__(self, config: BagelTextConfig, layer_idx: int):
        super().__init__()
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

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        attention_mask: torch.Tensor | None = None,
        past_key_values: CacheLayerMixin | CacheLayer | PrefixLayer | None = None,
        routing: Routing | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`, or `(tokens, hidden)` with a routing)
            position_embeddings (`tuple[tuple[torch.Tensor, torch.Tensor], ...]`):
                Cosines and sines for the tokens of each expert, shaped like them.
            attention_mask (`torch.Tensor` or `BlockMask`, *optional*): Mask in the attention's own format.
            past_key_values (`CacheLayerMixin`, `CacheLayer` or `PrefixLayer`, *optional*):
                What came before in this layer, see `layer_caches`; a `PrefixLayer` does not grow.
            routing (`Routing`, *optional*): Expert of every token; without it all take the understanding expert.

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        parts = split_experts(routing, hidden_states)
        normed = route(routing, parts, self.input_layernorm, self.input_layernorm_moe_gen)
        attended, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            routing=routing,
            **kwargs,
        )
        parts = _added(parts, attended)
        normed = route(routing, parts, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return join_parts(_added(parts, route(routing, normed, self.mlp, self.mlp_moe_gen)))


def _added(parts: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(part + other for part, other in zip(parts, others, strict=True))


def _whole_sequence(routing: Routing | None, heads: tuple[tuple[torch.Tensor, ...], ...]) -> Iterator[torch.Tensor]:
    """Queries, keys and values of both experts in the order of the sequence, `(batch, tokens, heads, head_dim)`."""
    for of_experts in zip(*heads, strict=True):
        stream = join_parts(of_experts)
        yield stream if routing is None else routing.to_sequence(stream)


def _parts_of_sequence(routing: Routing | None, sequence: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return split_experts(routing, sequence if routing is None else routing.to_stream(sequence))


class BagelVisionAttention(nn.Module):
    """Attention among the patches of each image of a packed row."""

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
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(0, 1).unsqueeze(0)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs |= {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "is_causal": False,
        }
        if len(cu_seqlens) > 1 and is_flash_attention_requested(self.config):
            max_seqlen = get_max_seqlen(cu_seqlens, self.config)
            attn_output, attn_weights = attention_interface(
                self,
                query,
                key,
                value,
                None,
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=max_seqlen,
                max_length_k=max_seqlen,
                **kwargs,
            )
        elif len(cu_seqlens) == 1:
            # No image: all three projections stay in the graph, as a distributed training needs.
            attn_output, attn_weights = (query + key + value).transpose(1, 2), None
        else:
            lengths = cu_seqlens.diff().tolist()
            images = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
            outputs = [attention_interface(self, *image, None, **kwargs) for image in images]
            attn_output = torch.cat([output for output, _ in outputs], dim=1)
            # One map an image, since they differ in size.
            maps = tuple(weights for _, weights in outputs)
            attn_weights = maps[0] if maps[0] is None or len(maps) == 1 else maps
        return self.out_proj(attn_output[0].flatten(-2)), attn_weights


class BagelVisionEncoderLayer(GradientCheckpointingLayer):
    """A SigLIP layer over packed images."""

    def __init__(self, config: BagelVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = BagelVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(patches, hidden)` -> `(patches, hidden)`; `cu_seqlens` holds the borders of the images."""
        attn_output, _ = self.self_attn(self.layer_norm1(hidden_states), cu_seqlens, **kwargs)
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
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(patches, hidden)` -> `(patches, hidden)`."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, cu_seqlens, **kwargs)
        return hidden_states


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
    """Cosines, then sines, of raw timesteps in [0, 1]; longest period 1e4 (published behaviour, point 12).

    `(images,)` -> `(images, dim)`, float32.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device) / (dim // 2)
    angles = timesteps.float()[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * exponents)
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
    """2-D sinusoids of a grid, `(side * side, hidden_size)`; the first half of a row tells the column (point 10)."""
    quarter = hidden_size // 4
    omega = 1e4 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
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
        return self.pos_embed[position_ids]


class BagelVelocityHead(nn.Linear):
    """Projection of a latent token to its velocity, which starts at zero in a new model (point 37)."""


class BagelPreTrainedModel(BagelAdapterMixin, PreTrainedModel):
    """What all BAGEL classes share: capabilities, initialisation, strict loading."""

    config_class = BagelConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer", "BagelVisionEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _skip_keys = ["past_key_values"]
    # What quantisers leave alone. See `_get_dtype_plan`.
    _keep_in_fp32_modules = SENSITIVE_MODULES
    _group_offload_block_modules = OFFLOAD_BLOCKS
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: Any = {"hidden_states": BagelDecoderLayer, "attentions": BagelAttention}

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """
        Compile the layers, and nothing around them, like [`ModelMixin.compile_repeated_blocks`] of diffusers.

        One graph serves all layers of a kind, and one all lengths of prompts.

        Args:
            args, kwargs: Of [`torch.compile`].
        """
        for module in self.modules():
            if type(module).__name__ in self._no_split_modules:
                module.compile(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BagelPositionEmbedding):
            init.copy_(module.pos_embed, sincos_table(module.side, module.hidden_size))
        elif isinstance(module, BagelVelocityHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def post_init(self) -> None:
        super().post_init()
        self._keep_in_fp32_modules |= unpackable_modules(self)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """None: all weights have the type that was asked for. The library would also upcast, in float16, what
        `_keep_in_fp32_modules` keeps from being quantised."""
        return {}

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, torch.Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        # Names and shapes are compared from the files' headers, before the first tensor is read.
        # The files of an adapter, which come with `expected_keys`, are no checkpoint.
        quantizer = load_config.hf_quantizer
        holds_weights = quantizer is None or not quantizer.pre_quantized
        if checkpoint_files and state_dict is None and expected_keys is None and holds_weights:
            check_checkpoint_files(model, checkpoint_files, load_config)
            if not is_deepspeed_zero3_enabled():
                state_dict = tensors_to_convert(checkpoint_files, None if quantizer else load_config.dtype)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)


class BagelVisionModel(BagelPreTrainedModel):
    """The SigLIP tower over packed patches: attention stays inside each image, no pooling head, no rope (point 11)."""

    config_class = BagelVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": BagelVisionEncoderLayer, "attentions": BagelVisionAttention}

    def __init__(self, config: BagelVisionConfig):
        super().__init__(config)
        self.patch_dim = config.num_channels * config.patch_size**2
        self.embeddings = BagelVisionEmbeddings(config)
        self.encoder = BagelVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: torch.LongTensor,
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(patches, channels * patch_size ** 2)`): Packed patches.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of patches of each image.
            position_ids (`torch.LongTensor` of shape `(patches,)`, *optional*):
                Rows of the position table; `row * side + column` by default.
        """
        if position_ids is None:
            position_ids = patch_grid_ids(image_grid_hw, self.config.image_size // self.config.patch_size)
        lengths = image_grid_hw.prod(-1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        hidden_states = self.embeddings(pixel_values, position_ids)
        hidden_states = self.encoder(hidden_states, cu_seqlens.to(hidden_states.device), **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(hidden_states))


class BagelTextModel(BagelPreTrainedModel):
    """The language model with two experts in every layer."""

    config_class = BagelTextConfig
    input_modalities = ("text",)

    def __init__(self, config: BagelTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BagelDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen: Any = None
        if config.visual_gen:
            self.norm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | PrefixCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        block_sequence_ids: torch.LongTensor | None = None,
        and_mask_function: Callable | None = None,
        routing: Routing | None = None,
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Token ids; or pass `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*):
                0 at padding, `(batch, past + tokens)`; or a mask already in the attention's own format.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Rope positions.
            past_key_values (`Cache` or `PrefixCache`, *optional*): What came before; a `PrefixCache` does not grow.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*): Embeddings.
            use_cache (`bool`, *optional*): Whether to return a cache.
            block_sequence_ids (`torch.LongTensor` of shape `(batch, past + tokens)`, *optional*):
                Image block of each token, -1 for causal text.
            and_mask_function (`Callable`, *optional*): Further restriction of the mask outside the blocks.
            routing (`Routing`, *optional*): Expert of each token.
            position_embeddings (`tuple[tuple[torch.Tensor, torch.Tensor], ...]`, *optional*):
                What `rotation` makes of `position_ids`, if it was called before.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if isinstance(past_key_values, Cache) else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        if isinstance(past_key_values, PrefixCache):
            kwargs["is_causal"] = False
        elif not isinstance(attention_mask, SampleMasks):
            # Rope positions repeat inside a block: the mask must not be guessed from them.
            attention_mask = create_causal_mask(
                self.config,
                inputs_embeds,
                attention_mask,
                past_key_values,
                position_ids=None,
                and_mask_function=and_mask_function,
                block_sequence_ids=block_sequence_ids,
            )

        if position_embeddings is None:
            position_embeddings = self.rotation(inputs_embeds, position_ids, routing)
        hidden_states = inputs_embeds
        if routing is not None:
            hidden_states = routing.to_stream(hidden_states)
            if routing.freeze_und:
                und_states, gen_states = split_experts(routing, hidden_states)
                hidden_states = join_parts((und_states.detach(), gen_states))
        for layer, layer_cache in zip(self.layers, layer_caches(past_key_values, len(self.layers)), strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=layer_cache,
                routing=routing,
                **kwargs,
            )
        parts = split_experts(routing, hidden_states)
        latent_hidden_states = None if routing is None else parts[1]
        hidden_states = join_parts(route(routing, parts, self.norm, self.norm_moe_gen))
        return BagelModelOutputWithPast(
            last_hidden_state=hidden_states if routing is None else routing.to_sequence(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            latent_hidden_states=latent_hidden_states,
        )

    def rotation(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, routing: Routing | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Cosines and sines for the tokens of each expert.

        Args:
            hidden_states (`torch.Tensor`): Whose device and type they have.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): Rope positions.
            routing (`Routing`, *optional*): Expert of each token.
        """
        parts = self.rotary_emb(hidden_states, position_ids)
        if routing is not None:
            parts = tuple(routing.to_stream(part.expand(*routing.shape, -1)) for part in parts)
        return tuple(zip(*(split_experts(routing, part) for part in parts), strict=True))


@dataclass
class DenoisingBlocks:
    """What all steps of a denoising share, since neither noise nor latents decide it.

    Attributes:
        routing (`Routing`): Of the markers and latents of all blocks.
        marker_ids (`torch.LongTensor` of shape `(2 * images,)`): Start and end token of each block.
        counts (`torch.LongTensor` of shape `(images,)`): Latent tokens of each block.
        latent_positions (`torch.Tensor` of shape `(latent_tokens, hidden)`): Embeddings of the places in the images.
        position_embeddings (`tuple`): Of the rope, see `BagelTextModel.rotation`.
    """

    routing: Routing
    marker_ids: torch.Tensor
    counts: torch.Tensor
    latent_positions: torch.Tensor
    position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class BagelModel(BagelPreTrainedModel):
    """The language model, the tower that sees, and the layers between latents and tokens; no head."""

    # Each is None in a model without its half.
    vision_tower: Any
    connector: Any
    vit_pos_embed: Any
    time_embedder: Any
    vae2llm: Any
    llm2vae: Any
    latent_pos_embed: Any

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        text_config = config.get_text_config()
        text_config.visual_gen = config.visual_gen
        hidden_size = text_config.hidden_size
        self.language_model = BagelTextModel._from_config(text_config)

        self.vision_tower = self.connector = self.vit_pos_embed = None
        if config.visual_und:
            self.vision_tower = BagelVisionModel._from_config(config.vision_config)
            self.connector = BagelConnector(config)
            self.vit_pos_embed = BagelPositionEmbedding(config.vit_max_num_patch_per_side, hidden_size)

        self.time_embedder = self.vae2llm = self.llm2vae = self.latent_pos_embed = None
        if config.visual_gen:
            self.time_embedder = BagelTimestepEmbedder(config)
            self.vae2llm = nn.Linear(config.latent_dim, hidden_size)
            self.llm2vae = BagelVelocityHead(hidden_size, config.latent_dim)
            self.latent_pos_embed = BagelPositionEmbedding(config.max_latent_size, hidden_size)
        self._keys_to_ignore_on_load_unexpected = [
            *ignored_weights(config.visual_gen, config.visual_und),
            r"^(language_model\.)?lm_head\.",
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """ViT tokens of packed images, ready for the language model, in `pooler_output`.

        Args:
            pixel_values (`torch.Tensor` of shape `(patches, channels * patch_size ** 2)`): Packed patches.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of patches of each image.

        Returns:
            [`BaseModelOutputWithPooling`]: `pooler_output` is a tuple with a `(patches, hidden)` tensor an image.
        """
        self.check_image_inputs(pixel_values, image_grid_hw)
        position_ids = patch_grid_ids(
            image_grid_hw, self.config.vit_max_num_patch_per_side, self.config.interpolate_pos
        ).to(pixel_values.device)
        outputs = self.vision_tower(pixel_values, image_grid_hw, position_ids=position_ids, return_dict=True, **kwargs)
        features = self.connector(outputs.last_hidden_state)
        features = features + self.vit_pos_embed(position_ids.to(features.device)).to(features.dtype)
        outputs.pooler_output = features.split(image_grid_hw.prod(-1).tolist()) if len(image_grid_hw) else (features,)
        return outputs

    def latent_positions(self, latent_grid_hw: torch.LongTensor, device: torch.device) -> torch.Tensor:
        """Embeddings of the places of packed latents, `(latent_tokens, hidden)`.

        Args:
            latent_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of tokens of each image.
            device (`torch.device`): Of the latents.
        """
        position_ids = patch_grid_ids(latent_grid_hw, self.config.max_latent_size, self.config.interpolate_pos)
        return self.latent_pos_embed(position_ids.to(device))

    def embed_latents(
        self, latents: torch.Tensor, timesteps: torch.Tensor, counts: torch.LongTensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Tokens of packed latents: projection + timestep + position.

        Args:
            latents (`torch.Tensor` of shape `(latent_tokens, latent_dim)`): Packed latents of all images.
            timesteps (`torch.Tensor` of shape `(images,)`): In [0, 1]; 0 is clean.
            counts (`torch.LongTensor` of shape `(images,)`): Tokens of each image.
            positions (`torch.Tensor` of shape `(latent_tokens, hidden)`): See `latent_positions`.

        Returns:
            `torch.Tensor` of shape `(latent_tokens, hidden)`.
        """
        embeds = self.vae2llm(latents.to(self.vae2llm.weight.dtype))
        time = self.time_embedder(timesteps.to(latents.device)).repeat_interleave(
            counts, dim=0, output_size=latents.shape[0]
        )
        return embeds + time + positions.to(embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | PrefixCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        latent_grid_hw: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        latent_hidden_states: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """See [`BagelForConditionalGeneration.forward`]."""
        if latent_hidden_states is not None:
            return self._velocity(BagelModelOutputWithPast(latent_hidden_states=latent_hidden_states))
        self.check_image_inputs(pixel_values, image_grid_hw, latents, latent_grid_hw, timesteps)
        if input_ids is None and inputs_embeds is None:
            if latents is None or position_ids is None:
                raise ValueError(
                    "Pass `input_ids` or `inputs_embeds`; or, for a denoising step, `latents` with `latent_grid_hw`, "
                    "`timesteps` and `position_ids`."
                )
            return self._denoise(
                latents, latent_grid_hw, timesteps, position_ids, past_key_values, attention_mask, **kwargs
            )
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`, got both.")
        if isinstance(past_key_values, PrefixCache):
            raise ValueError("A `PrefixCache` serves denoising steps only. Pass a `Cache` as `past_key_values`.")
        # Without latents all tokens take the understanding expert.
        is_frozen = self.config.freeze_und and latents is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            return self._forward_sequence(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                pixel_values,
                image_grid_hw,
                latents,
                latent_grid_hw,
                timesteps,
                mm_token_type_ids,
                document_ids,
                mm_encoder_outputs,
                **kwargs,
            )

    def _denoise(
        self,
        latents: torch.Tensor,
        latent_grid_hw: torch.LongTensor,
        timesteps: torch.Tensor,
        position_ids: torch.LongTensor,
        past_key_values: Cache | PrefixCache | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        lengths = latent_grid_hw.prod(-1).tolist()
        if position_ids.numel() != len(lengths):
            raise ValueError(
                f"`position_ids` must hold one position for each of {len(lengths)} images, got {position_ids.numel()}."
            )
        if past_key_values is None:
            past_key_values = PrefixCache([PrefixLane(buffer=None)] * len(lengths))
        elif isinstance(past_key_values, Cache):
            past_key_values = PrefixCache.from_cache(past_key_values, max(lengths) + 2, attention_mask)
        if len(past_key_values) != len(lengths):
            raise ValueError(
                f"`past_key_values` has {len(past_key_values)} rows, but `latent_grid_hw` describes {len(lengths)} "
                "images."
            )
        blocks = past_key_values.once(
            (latents.device, latent_grid_hw.tolist(), position_ids.tolist()),
            lambda: self._blocks(latent_grid_hw, position_ids, past_key_values, latents.device),
        )
        embeds = self.embed_latents(latents, timesteps, blocks.counts, blocks.latent_positions)
        if isinstance(past_key_values, SplitPrefixCache):
            embeds = past_key_values.own_part(embeds)
        markers = self.get_input_embeddings()(blocks.marker_ids)
        outputs = self.language_model(
            inputs_embeds=torch.cat([markers.to(embeds.dtype), embeds]).unsqueeze(0),
            past_key_values=past_key_values,
            use_cache=False,
            routing=blocks.routing,
            position_embeddings=blocks.position_embeddings,
            **kwargs,
        )
        outputs.last_hidden_state = None
        if isinstance(past_key_values, SplitPrefixCache):
            outputs.latent_hidden_states = past_key_values.gather(outputs.latent_hidden_states)
        return self._velocity(outputs)

    def _blocks(
        self,
        latent_grid_hw: torch.LongTensor,
        position_ids: torch.LongTensor,
        cache: PrefixCache,
        device: torch.device,
    ) -> DenoisingBlocks:
        self.check_position_range(position_ids)
        # In the type of the embeddings, which the rope takes from them, too.
        latent_positions = self.latent_positions(latent_grid_hw, device).to(self.vae2llm.weight.dtype)
        all_counts = latent_grid_hw.prod(-1)
        counts = all_counts
        if isinstance(cache, SplitPrefixCache):
            if cache.lengths != all_counts.tolist():
                raise ValueError(
                    f"`past_key_values` splits blocks of {cache.lengths} latents, got blocks of {all_counts.tolist()}."
                )
            counts = torch.tensor(cache.own_lengths())
        routing = Routing.from_blocks(counts.tolist())
        markers = torch.tensor([self.config.vision_start_token_id, self.config.vision_end_token_id])
        position_ids = position_ids.flatten().to(counts.device)
        position_ids = torch.cat([position_ids.repeat_interleave(2), position_ids.repeat_interleave(counts)])
        return DenoisingBlocks(
            routing,
            markers.repeat(len(counts)).to(device),
            all_counts.to(device),
            latent_positions,
            self.language_model.rotation(latent_positions, position_ids.unsqueeze(0).to(device), routing),
        )

    def _forward_sequence(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.FloatTensor | None,
        use_cache: bool | None,
        pixel_values: torch.Tensor | None,
        image_grid_hw: torch.LongTensor | None,
        latents: torch.Tensor | None,
        latent_grid_hw: torch.LongTensor | None,
        timesteps: torch.Tensor | None,
        mm_token_type_ids: torch.LongTensor | None,
        document_ids: torch.LongTensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        if document_ids is not None and attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        has_images = not (pixel_values is None and image_outputs is None and latents is None)
        token_types = self._token_types(input_ids, inputs_embeds, mm_token_type_ids, document_ids, has_images)
        layout = None
        if latents is not None:
            layout = SequenceLayout.from_latents(token_types, timesteps, latent_grid_hw, document_ids)
        elif token_types is not None:
            layout = SequenceLayout(token_types, None, document_ids)
        if past_key_values is not None and not is_torchdynamo_compiling() and past_key_values.get_seq_length() == 0:
            past_key_values.holds_image_blocks = False
        if position_ids is None:
            position_ids = self._default_position_ids(layout, input_ids, attention_mask, past_key_values)
        if position_ids is None:
            # Text alone: positions are places.
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            tokens: Any = inputs_embeds if input_ids is None else input_ids
            self._check_positions_end(past + tokens.shape[1])
        elif position_ids.shape[-1] > 1:
            self.check_position_range(position_ids)

        inputs_embeds = self._embed_sequence(
            layout,
            input_ids,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            latents,
            latent_grid_hw,
            timesteps,
            image_outputs,
            **kwargs,
        )
        if layout is None:
            return self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        has_latents = latents is not None
        if is_flash_attention_requested(self.config.get_text_config()):
            outputs = self._forward_runs(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, layout, has_latents, **kwargs
            )
        else:
            outputs = self._forward_masked(
                inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, layout, has_latents, **kwargs
            )
        if outputs.past_key_values is not None:
            outputs.past_key_values.holds_image_blocks = True
        return self._velocity(outputs)

    def _embed_sequence(
        self,
        layout: SequenceLayout | None,
        input_ids: Any,
        inputs_embeds: torch.FloatTensor | None,
        pixel_values: torch.Tensor | None,
        image_grid_hw: torch.LongTensor | None,
        latents: torch.Tensor | None,
        latent_grid_hw: Any,
        timesteps: torch.Tensor | None,
        image_outputs: BaseModelOutputWithPooling | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Embeddings of a sequence, `(batch, tokens, hidden)`, with its images in place of their placeholders."""
        if layout is None:
            return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        types = layout.token_types
        num_patches = 0 if image_grid_hw is None else int(image_grid_hw.prod(-1).sum())
        if image_outputs is not None:
            num_patches = sum(len(features) for features in image_outputs.pooler_output)
        check_placeholders(types, IMAGE_TOKEN, num_patches, "pixel_values")
        check_placeholders(types, LATENT_TOKEN, 0 if latents is None else len(latents), "latents")
        if inputs_embeds is None:
            # The ids of placeholders are never looked up: a tokenizer may have given them any number.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(types != TEXT_TOKEN, 0))
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, image_grid_hw, return_dict=True, **kwargs)
        if image_outputs is not None:
            features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter((types == IMAGE_TOKEN).unsqueeze(-1), features)
        if latents is not None:
            counts = latent_grid_hw.prod(-1).to(latents.device)
            positions = self.latent_positions(latent_grid_hw, latents.device)
            latent_embeds = self.embed_latents(latents, timesteps, counts, positions).to(inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter((types == LATENT_TOKEN).unsqueeze(-1), latent_embeds)
        return inputs_embeds

    def _forward_masked(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_key_values: Cache | None,
        use_cache: bool | None,
        layout: SequenceLayout,
        has_latents: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """The whole sequence in one forward, under one mask."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if layout.is_packed and past:
            raise ValueError("`document_ids` and noised `latents` inside a sequence cannot follow a filled cache.")
        routing = Routing.from_token_types(layout.token_types, self.config.freeze_und) if has_latents else None
        masks: dict[str, Any] = {
            "attention_mask": attention_mask,
            "block_sequence_ids": layout.block_ids(past),
            "and_mask_function": layout.mask_function() if layout.is_packed else None,
        }
        if layout.document_ids is not None and not self._takes_packed_rows(inputs_embeds.device):
            if use_cache or past_key_values is not None:
                raise ValueError("`document_ids` cannot be used with a cache. Leave out `past_key_values`.")
            masks, use_cache = {"attention_mask": layout.sample_masks()}, False
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            routing=routing,
            **masks,
            **kwargs,
        )
        outputs.hidden_states = _in_sequence(outputs.hidden_states, routing)
        return outputs

    def _takes_packed_rows(self, device: torch.device) -> bool:
        """Whether the attention has a sparse mask for packed rows; others go through them sample by sample."""
        if self.config.get_text_config()._attn_implementation != "flex_attention":
            return False
        if device.type in NO_FLEX_BACKWARD and torch.is_grad_enabled():
            logger.warning_once(
                f"Flex attention has no backward on {device.type}: packed rows are attended sample by sample."
            )
            return False
        return True

    def _forward_runs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_key_values: Cache | None,
        use_cache: bool | None,
        layout: SequenceLayout,
        has_latents: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """Flash attention takes no block mask: feed the sequence run by run, each causal or bidirectional."""
        if layout.is_packed or (attention_mask is not None and not attention_mask.all()):
            raise ValueError(
                "Flash attention takes no mask of image blocks beside padding, `document_ids` or noised latents. "
                'Pass the rows one by one, or load the model with `attn_implementation="sdpa"`.'
            )
        cache = GrowingCache(self.config) if past_key_values is None else past_key_values
        position_ids = position_ids.expand(inputs_embeds.shape[:2])
        # Without padding the mask tells the filled places of a static cache.
        behind = 0 if attention_mask is None else attention_mask.shape[1] - inputs_embeds.shape[1]
        hidden, latent_hidden, layers = [], [], []
        for start, stop, is_block in layout.runs():
            routing = Routing.from_token_types(layout.token_types[:, start:stop]) if has_latents else None
            outputs = self.language_model(
                inputs_embeds=inputs_embeds[:, start:stop],
                attention_mask=None if attention_mask is None else attention_mask[:, : behind + stop],
                position_ids=position_ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                routing=routing,
                **({"is_causal": False} if is_block else {}),
                **kwargs,
            )
            hidden.append(outputs.last_hidden_state)
            layers.append(_in_sequence(outputs.hidden_states, routing))
            if has_latents:
                latent_hidden.append(outputs.latent_hidden_states.unflatten(0, (inputs_embeds.shape[0], -1)))
        return BagelModelOutputWithPast(
            last_hidden_state=torch.cat(hidden, dim=1),
            past_key_values=None if use_cache is False else cache,
            hidden_states=_join_runs(layers),
            latent_hidden_states=torch.cat(latent_hidden, dim=1).flatten(0, 1) if has_latents else None,
        )

    def _token_types(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        mm_token_type_ids: torch.LongTensor | None,
        document_ids: torch.LongTensor | None,
        has_images: bool,
    ) -> torch.LongTensor | None:
        """Type of each token, or `None` for one sample of text alone."""
        types = mm_token_type_ids
        if types is None and input_ids is not None:
            types = token_types_from_ids(input_ids, self.config.image_token_id, self.config.latent_token_id)
        if types is None and document_ids is not None and not has_images:
            types = torch.zeros_like(document_ids)
        if types is None and has_images:
            raise ValueError("`inputs_embeds` with images needs `mm_token_type_ids` to tell where the images stand.")
        if types is None or has_images or document_ids is not None:
            return types
        # A decoding step holds no image; asking the values would cost a synchronisation at every token.
        if types.shape[1] == 1 or is_torchdynamo_compiling():
            return None
        return types if types.any() else None

    def _default_position_ids(
        self,
        layout: SequenceLayout | None,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.LongTensor | None:
        if past_key_values is not None and past_key_values.get_seq_length():
            if getattr(past_key_values, "holds_image_blocks", False) or layout is not None:
                raise ValueError(
                    "`position_ids` must be passed to continue a sequence with images: an image takes one position, "
                    "whatever its number of tokens."
                )
            return None
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if layout is None:
            return None if padding is None else rope_positions(torch.zeros_like(padding, dtype=torch.long), padding)
        return layout.position_ids(padding)

    def check_image_inputs(
        self,
        pixel_values: torch.Tensor | None,
        image_grid_hw: torch.LongTensor | None,
        latents: torch.Tensor | None = None,
        latent_grid_hw: Any = None,
        timesteps: torch.Tensor | None = None,
    ) -> None:
        """
        Raises:
            ValueError: if the images of a forward do not fit each other, or the model.
        """
        if pixel_values is not None:
            if not self.config.visual_und:
                raise ValueError(
                    "`pixel_values` were passed to a model without its seeing half. Load it with `visual_und=True`."
                )
            _check_packed("pixel_values", pixel_values, "image_grid_hw", image_grid_hw, self.vision_tower.patch_dim)
        if latents is not None:
            if not self.config.visual_gen:
                raise ValueError(
                    "`latents` were passed to a model without its drawing half. Load it with `visual_gen=True`."
                )
            _check_packed("latents", latents, "latent_grid_hw", latent_grid_hw, self.config.latent_dim)
            images = len(latent_grid_hw)
            if not isinstance(timesteps, torch.Tensor) or timesteps.shape != (images,):
                raise ValueError(
                    f"`timesteps` must be a tensor of shape ({images},), one for each image of `latents`."
                )

    def check_position_range(self, position_ids: torch.LongTensor) -> None:
        """
        Raises:
            ValueError: if a rope position lies outside the range that the model knows.
        """
        if not is_torchdynamo_compiling():
            if int(position_ids.min()) < 0:
                raise ValueError(f"`position_ids` must not be negative, got {int(position_ids.min())}.")
            self._check_positions_end(int(position_ids.max()) + 1)

    def _check_positions_end(self, end: int | torch.Tensor) -> None:
        text_config = self.config.get_text_config()
        if is_torchdynamo_compiling() or text_config.rope_parameters["rope_type"] != "default":
            # A scaled rope is there to go beyond the range.
            return
        limit = text_config.max_position_embeddings
        if end > limit:
            raise ValueError(
                f"The context takes {int(end)} rope positions, but the model knows {limit} "
                "(`max_position_embeddings`). Shorten the prompt."
            )

    def _velocity(self, outputs: BagelModelOutputWithPast) -> BagelModelOutputWithPast:
        if outputs.latent_hidden_states is not None:
            outputs.velocity = self.llm2vae(self.language_model.norm_moe_gen(outputs.latent_hidden_states))
        return outputs


def _in_sequence(
    hidden_states: tuple[torch.Tensor | None, ...] | None, routing: Routing | None
) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states recorded inside the layers, put from the order of the stream into that of the sequence."""
    if hidden_states is None or routing is None:
        return hidden_states
    return tuple(
        states if states is None or states.ndim == 3 else routing.to_sequence(states) for states in hidden_states
    )


def _join_runs(runs: list[Any]) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states of all runs, layer by layer."""
    if runs[0] is None:
        return None
    return tuple(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*runs, strict=True))


def _check_packed(name: str, values: Any, grid_name: str, grid: Any, dim: int) -> None:
    is_grid = isinstance(grid, torch.Tensor) and grid.ndim == 2 and grid.shape[1] == 2
    if not is_grid or any(side < 1 for sides in grid.tolist() for side in sides):
        raise ValueError(
            f"`{grid_name}` must be a tensor of shape (images, 2) with the rows and columns of each image of `{name}`."
        )
    shape = (sum(rows * columns for rows, columns in grid.tolist()), dim)
    if not isinstance(values, torch.Tensor) or values.shape != shape:
        given = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"`{name}` must be a tensor of shape {shape}, as `{grid_name}` says, got {given}.")


class BagelForConditionalGeneration(BagelPreTrainedModel, BagelGenerationMixin):
    """BAGEL with its two heads: next-token scores for text, velocities for image latents."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # Two losses with a count each: they are averaged here, over all ranks.
    accepts_loss_kwargs = False

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.model = BagelModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self._keys_to_ignore_on_load_unexpected = ignored_weights(config.visual_gen, config.visual_und)
        # Files have the published names, and `Trainer` fills the model from them without the library's renaming.
        self.register_load_state_dict_pre_hook(rename_published_weights)
        self.post_init()

    def freeze(self, *towers: str) -> None:
        """
        Keep parts of the model as they are in a training.

        Args:
            towers (`str`):
                Any of `"vit"` (the tower that sees), `"connector"`, `"und"` (the understanding expert, embeddings and
                text head) and `"gen"` (the generation expert and the layers around latents). For `"und"` gradients
                also stop at the expert's activations (published behaviour, point 35): `config.freeze_und` is set, and
                since none could reach the tower and the connector any more, they are frozen too.

        Raises:
            ValueError: if there is no such part.
        """
        if unknown := set(towers) - set(TOWERS):
            raise ValueError(f"`towers` must be of {', '.join(TOWERS)}, got {', '.join(sorted(unknown))}.")
        if "und" in towers:
            self.config.freeze_und = True
            towers = (*towers, "vit", "connector")
        for name, parameter in self.named_parameters():
            if any(re.match(TOWERS[tower], name) for tower in towers):
                parameter.requires_grad_(False)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hw: torch.LongTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`BagelModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_hw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | PrefixCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.LongTensor | None = None,
        latents: torch.Tensor | None = None,
        latent_grid_hw: Any = None,
        timesteps: Any = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        noise: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_totals: torch.Tensor | None = None,
        latent_hidden_states: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelOutput:
        r"""
        Text, seeing, drawing and training go through this one method.

        A sequence is described by `input_ids` with placeholders, and `pixel_values` and `latents` in the order of
        their placeholders. Without `input_ids` and `inputs_embeds` it is a **denoising step**: `latents` are blocks
        of their own, one a row of `past_key_values`, which is read and not grown.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Rope positions; needed after a cache that holds images. For a denoising step `(images,)`: the next
                position of each row.
            past_key_values (`Cache` or `PrefixCache`, *optional*): What came before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`.
            pixel_values (`torch.Tensor` of shape `(patches, channels * patch_size ** 2)`, *optional*):
                Packed ViT patches, values in (row, column, channel) order.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)`, *optional*): Rows and columns of ViT patches.
            latents (`torch.Tensor` of shape `(latent_tokens, latent_dim)`, *optional*):
                Packed VAE latents, values in (row, column, channel) order. Clean ones if `noise` is passed.
            latent_grid_hw (`torch.LongTensor` of shape `(images, 2)`, *optional*): Rows and columns of latent tokens.
            timesteps (`torch.Tensor` of shape `(images,)`, *optional*):
                Noise level of each latent image in [0, 1]; 0 is clean, a condition.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                0 text, 1 ViT placeholder, 4 latent placeholder; read off `input_ids` by default.
            document_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Sample of each token of a packed row, negative at padding; attention never crosses samples.
            noise (`torch.Tensor` of shape `(latent_tokens, latent_dim)`, *optional*):
                Training: mixed into `latents` by `timesteps`; the target of the velocity is `noise - latents`.
            labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Training: token ids where a token is to be predicted from those before it, -100 elsewhere.
            loss_totals (`torch.FloatTensor` of shape `(2,)`, *optional*):
                Training: what the sums of `ce_loss` and `mse_loss` are divided by, see [`loss_totals`]. By default the
                totals of this batch, or, in training mode, those of all ranks' batches: then the mean of the ranks'
                losses is the loss of the global batch.
            latent_hidden_states (`torch.Tensor` of shape `(latent_tokens, hidden_size)`, *optional*):
                Instead of everything else: apply only the velocity head to a last layer's output (TaylorSeer).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute the scores of that many last tokens only; 0 means all.
            skip_logits (`bool`, *optional*):
                Leave `logits` out of the output. By default they are left out in training mode with `labels`: the loss
                needs those of its targets only, and all of them are the largest tensor of a training step.
            mm_encoder_outputs (`dict`, *optional*): `{"image": get_image_features(...)}` computed before.

        Returns:
            [`BagelOutput`]

        Raises:
            ValueError: if placeholders and images do not match, or if an image or the context is too large.

        Example:

        ```python
        >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
        ...                                        return_dict=True, return_tensors="pt")
        >>> logits = model(**inputs).logits
        ```
        """
        has_loss = labels is not None or noise is not None
        if noise is not None and (latents is None or timesteps is None or latent_grid_hw is None):
            raise ValueError("`noise` needs `latents`, `latent_grid_hw` and `timesteps` beside it.")
        if has_loss:
            use_cache = bool(use_cache)
            mm_token_type_ids = self._types_for_loss(input_ids, inputs_embeds, mm_token_type_ids)
        if has_loss and self.training:
            if pixel_values is None and self.config.visual_und:
                pixel_values, image_grid_hw = self._no_images(self.model.vision_tower.patch_dim)
            if latents is None and self.config.visual_gen:
                latents, latent_grid_hw = self._no_images(self.config.latent_dim)
                noise, timesteps = latents, torch.empty(0, device=self.device)
        clean = latents
        if noise is not None:
            level = timesteps.repeat_interleave(latent_grid_hw.prod(-1).to(timesteps.device)).unsqueeze(-1)
            latents = (1 - level) * clean + level * noise
        outputs: BagelModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            latents=latents,
            latent_grid_hw=latent_grid_hw,
            timesteps=timesteps,
            mm_token_type_ids=mm_token_type_ids,
            document_ids=document_ids,
            latent_hidden_states=latent_hidden_states,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = loss = ce_loss = mse_loss = None
        if outputs.last_hidden_state is not None and not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if has_loss:
            text = latent = None
            if labels is not None:
                text = self._text_loss(outputs.last_hidden_state, labels, document_ids)
            if noise is not None:
                weights = latent_weights(
                    mm_token_type_ids, document_ids, timesteps, latent_grid_hw, self.config.loss_reduction
                )
                latent = flow_matching_sum(outputs.velocity, clean, noise, weights), weights.sum()
            loss, ce_loss, mse_loss = self._mean_losses(text, latent, loss_totals)
        return BagelOutput(
            loss=loss,
            ce_loss=ce_loss,
            mse_loss=mse_loss,
            logits=logits,
            velocity=outputs.velocity,
            latent_hidden_states=outputs.latent_hidden_states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _types_for_loss(
        self, input_ids: Any, inputs_embeds: Any, mm_token_type_ids: torch.LongTensor | None
    ) -> torch.Tensor:
        if mm_token_type_ids is not None:
            return mm_token_type_ids
        if input_ids is not None:
            return token_types_from_ids(input_ids, self.config.image_token_id, self.config.latent_token_id)
        if inputs_embeds is None:
            raise ValueError("`labels` and `noise` need the sequence that they belong to. Pass `input_ids`.")
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)

    def _no_images(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed values and grid of no image: every rank must use all weights in every step, or the others wait."""
        return torch.empty(0, dim, device=self.device), torch.empty(0, 2, dtype=torch.long, device=self.device)

    def _text_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, document_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the cross-entropies, and sum of the weights; scores are made for the targets only."""
        targets, weights = text_targets(labels.to(hidden_states.device), document_ids, self.config.loss_reduction)
        is_target = targets != IGNORED_LABEL
        logits = self.lm_head(hidden_states[is_target])
        return cross_entropy_sum(logits, targets[is_target].to(logits.device), weights), weights.sum()

    def _mean_losses(
        self,
        text: tuple[torch.Tensor, torch.Tensor] | None,
        latent: tuple[torch.Tensor, torch.Tensor] | None,
        loss_totals: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The weighted loss and the two losses it is made of, from a sum and a total of each that was asked for."""
        sums = [None if part is None else part[0] for part in (text, latent)]
        totals, factor = loss_totals, 1
        if totals is None:
            totals = torch.stack(
                [torch.zeros((), device=self.device) if part is None else part[1] for part in (text, latent)]
            )
            if self.training:
                totals, factor = over_ranks(totals)
        # Without a target the sum is zero, and has a graph.
        totals = torch.where(totals > 0, totals, 1)
        means = [
            None if part is None else factor * part / total.to(part.device)
            for part, total in zip(sums, totals, strict=True)
        ]
        weighted = [
            weight * mean
            for weight, mean in zip((self.config.ce_weight, self.config.mse_weight), means, strict=True)
            if mean is not None
        ]
        return torch.stack(weighted).sum(), means[0], means[1]


__all__ = [
    "BagelForConditionalGeneration",
    "BagelModel",
    "BagelModelOutputWithPast",
    "BagelOutput",
    "BagelPreTrainedModel",
    "BagelTextModel",
    "BagelVisionModel",
]
