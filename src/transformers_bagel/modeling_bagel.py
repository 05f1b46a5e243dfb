# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL: a Qwen2 language model whose every layer has a second expert for image latents, and a SigLIP tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, is_torchdynamo_compiling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters import BagelAdapterMixin
from .attention import choose_attention
from .cache import GrowingCache, PrefixCache, PrefixView, check_equal_lengths, layer_caches
from .checks import (
    check_image_inputs,
    check_layout,
    check_placeholders,
    check_position_range,
    check_positions_end,
)
from .configuration_bagel import BagelConfig, BagelTextConfig, BagelVisionConfig
from .context_parallel import SplitPrefixCache
from .embeddings import (
    BagelConnector,
    BagelPositionEmbedding,
    BagelTimestepEmbedder,
    BagelVelocityHead,
    sincos_table,
)
from .generation_bagel import BagelGenerationMixin
from .layers import BagelAttention, BagelDecoderLayer, in_residual_dtype, run_in_turn
from .loading import BagelLoadingMixin, ignored_weights, rename_weights
from .products import by_best_products
from .segments import IMAGE_TOKEN, LATENT_TOKEN, TEXT_TOKEN
from .sequence import (
    ExpertRouting,
    SequenceLayout,
    areas,
    host_grids,
    join_experts,
    patch_grid_ids,
    rope_positions,
    route,
    split_experts,
    token_types_from_ids,
)
from .training.freezing import freeze_parts
from .training.losses import Losses, latent_loss, latent_weights, mean_losses, text_loss, text_targets
from .vision import BagelVisionAttention, BagelVisionEmbeddings, BagelVisionEncoder, BagelVisionEncoderLayer


@dataclass
class BagelModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`BagelTextModel`] and [`BagelModel`].

    Args:
        velocity (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`, *optional*):
            Flow from data to noise at every latent token, packed like `latents`.
        latent_hidden_states (`torch.FloatTensor` of shape `(latent_tokens, hidden_size)`, *optional*):
            Output of the last layer at the latent tokens, before the final norm.
        layout (`SequenceLayout`, *optional*): Types of the tokens; `None` for text alone.
    """

    velocity: torch.FloatTensor | None = None
    latent_hidden_states: torch.FloatTensor | None = None
    layout: SequenceLayout | None = None


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


class BagelPreTrainedModel(BagelLoadingMixin, BagelAdapterMixin, PreTrainedModel):
    """What all BAGEL classes share: capabilities, initialisation, strict loading."""

    config_class = BagelConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer", "BagelVisionEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _skip_keys = ["past_key_values"]
    # Modules that group offloading looks into for layers, and those that are used outside the forward of their owner or
    # stand around the layers: each is moved by itself. With a stream only the innermost owner of layers may have
    # modules that are not named here, since it alone learns in which order they are used.
    _group_offload_block_modules = [
        *("model", "language_model", "vision_tower", "encoder", "embed_tokens", "rotary_emb", "norm_moe_gen"),
        *("connector", "vit_pos_embed", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed", "lm_head"),
    ]
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
            args, kwargs: Of [`torch.compile`]. `recompile_limit` is 64 by default: reading, writing, drawing and editing
                in all their forms come to some thirty graphs, of which torch would allow eight.
        """
        kwargs.setdefault("recompile_limit", 64)
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
        image_grid_hw: torch.LongTensor | list[list[int]],
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Features of packed images.

        Args:
            pixel_values (`torch.Tensor` of shape `(patches, channels * patch_size ** 2)`): Packed patches.
            image_grid_hw (`torch.LongTensor` of shape `(images, 2)` or `list[list[int]]`):
                Rows and columns of patches of each image, best on the CPU, where they are read.
            position_ids (`torch.LongTensor` of shape `(patches,)`, *optional*):
                Rows of the position table; `row * side + column` by default.
        """
        sides = image_grid_hw.tolist() if isinstance(image_grid_hw, torch.Tensor) else image_grid_hw
        if position_ids is None:
            grid = torch.tensor(sides, dtype=torch.long).reshape(-1, 2)
            position_ids = patch_grid_ids(grid, self.config.image_size // self.config.patch_size)
        hidden_states = self.embeddings(pixel_values, position_ids.to(pixel_values.device))
        hidden_states = self.encoder(hidden_states, tuple(rows * columns for rows, columns in sides), **kwargs)
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
        layout: SequenceLayout | None = None,
        routing: ExpertRouting | None = None,
        position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None,
        residual_dtype: torch.dtype | None = None,
        run_layers: Callable[..., torch.Tensor] = run_in_turn,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """
        Hidden states of a sequence, or of the blocks of a denoising step.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Token ids; or pass `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*):
                0 at padding, `(batch, past + tokens)`; or a mask already in the attention's own format.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Rope positions.
            past_key_values (`Cache` or `PrefixCache`, *optional*): What came before; a `PrefixCache` does not grow.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*): Embeddings.
            use_cache (`bool`, *optional*): Whether to return a cache.
            layout (`SequenceLayout`, *optional*): Types of the tokens; by default all are text.
            routing (`ExpertRouting`, *optional*): Expert of each token.
            position_embeddings (`tuple[tuple[torch.Tensor, torch.Tensor], ...]`, *optional*):
                What `rotation` makes of `position_ids`, if it was called before.
            residual_dtype (`torch.dtype`, *optional*): See [`BagelForConditionalGeneration.forward`].
            run_layers (`Callable`, *optional*, defaults to `run_in_turn`):
                Leads hidden states through the layers. A step cache, which may leave some of them out, belongs to the one who
                calls: the model keeps nothing of it.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = inputs_embeds.to(residual_dtype or inputs_embeds.dtype)
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config)
        attention_layout = choose_attention(self.config, inputs_embeds, attention_mask, past_key_values, layout)
        cache = self._writable_cache(past_key_values)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        if position_embeddings is None:
            position_embeddings = self.rotation(inputs_embeds, position_ids, routing)

        hidden_states = inputs_embeds
        if routing is not None:
            hidden_states = routing.to_expert_order(hidden_states)
            if routing.freeze_und:
                und_states, gen_states = split_experts(routing, hidden_states)
                hidden_states = join_experts((und_states.detach(), gen_states))
        caches = layer_caches(cache, self.config.num_hidden_layers)
        layouts = [attention_layout.layer(index) for index in range(len(caches))]
        hidden_states = run_layers(
            self.layers,
            hidden_states,
            attention_layouts=layouts,
            layer_caches=caches,
            position_embeddings=position_embeddings,
            routing=routing,
            **kwargs,
        )
        check_equal_lengths(caches)
        states = split_experts(routing, hidden_states)
        latent_hidden_states = None if routing is None else states[1]
        hidden_states = join_experts(route(routing, states, self.norm, self.norm_moe_gen))
        return BagelModelOutputWithPast(
            last_hidden_state=hidden_states if routing is None else routing.to_sequence(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            latent_hidden_states=latent_hidden_states,
        )

    def _writable_cache(self, past_key_values: Cache | PrefixCache | None) -> Cache | None:
        """The cache that the layers write into.

        Raises:
            ValueError: if gradient checkpointing would compute the layers again, and write each token twice.
        """
        if past_key_values is None or isinstance(past_key_values, PrefixCache):
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "A cache cannot be written under gradient checkpointing. Leave out `past_key_values`, or call the model "
                "under `torch.no_grad()`."
            )
        return past_key_values

    def rotation(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor, routing: ExpertRouting | None = None
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Cosines and sines for the tokens of each expert.

        Args:
            hidden_states (`torch.Tensor`): Whose device and type they have.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`): Rope positions.
            routing (`ExpertRouting`, *optional*): Expert of each token.
        """
        waves = self.rotary_emb(hidden_states, position_ids)
        if routing is not None:
            waves = tuple(routing.to_expert_order(wave.expand(*routing.shape, -1)) for wave in waves)
        return tuple(zip(*(split_experts(routing, wave) for wave in waves), strict=True))


@dataclass
class DenoisingBlocks:
    """What all denoising steps of an image share: nothing of it depends on noise or latents.

    Attributes:
        routing (`ExpertRouting`): Of the markers and latents of all blocks.
        marker_ids (`torch.LongTensor` of shape `(2 * images,)`): Start and end token of each block.
        counts (`torch.LongTensor` of shape `(images,)`): Latent tokens of each block.
        latent_positions (`torch.Tensor` of shape `(latent_tokens, hidden)`): Embeddings of the places in the images.
        position_embeddings (`tuple`): Of the rope, see [`BagelTextModel.rotation`].
    """

    routing: ExpertRouting
    marker_ids: torch.Tensor
    counts: torch.Tensor
    latent_positions: torch.Tensor
    position_embeddings: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class BagelModel(BagelPreTrainedModel):
    """The language model, the vision tower, and the layers between latents and tokens; no head."""

    # Each is None in a model without `visual_und`, or without `visual_gen`.
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

        Raises:
            ValueError: if the two do not fit each other, or the model.
        """
        grid: Any = image_grid_hw.cpu() if isinstance(image_grid_hw, torch.Tensor) else image_grid_hw
        check_image_inputs(self.config, pixel_values, grid)
        position_ids = patch_grid_ids(grid, self.config.vit_max_num_patch_per_side, self.config.interpolate_pos)
        position_ids = position_ids.to(pixel_values.device, non_blocking=True)
        # As numbers, which no hook moves to a device.
        sides = grid.tolist()
        outputs = self.vision_tower(pixel_values, sides, position_ids=position_ids, return_dict=True, **kwargs)
        features = self.connector(outputs.last_hidden_state)
        features = features + self.vit_pos_embed(position_ids).to(features.device, features.dtype)
        outputs.pooler_output = features.split([rows * columns for rows, columns in sides]) if sides else (features,)
        return outputs

    def latent_positions(self, latent_grid_hw: torch.LongTensor) -> torch.Tensor:
        """Embeddings of the places of packed latents, `(latent_tokens, hidden)`, on the device of the position table.

        Args:
            latent_grid_hw (`torch.LongTensor` of shape `(images, 2)`): Rows and columns of tokens of each image.
        """
        position_ids = patch_grid_ids(latent_grid_hw, self.config.max_latent_size, self.config.interpolate_pos)
        return self.latent_pos_embed(position_ids)

    def embed_latents(
        self, latents: torch.Tensor, timesteps: torch.Tensor, counts: torch.LongTensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Tokens of packed latents: projection + timestep + position (point 12).

        Args:
            latents (`torch.Tensor` of shape `(latent_tokens, latent_dim)`): Packed latents of all images.
            timesteps (`torch.Tensor` of shape `(images,)`): In [0, 1]; 0 is clean.
            counts (`torch.LongTensor` of shape `(images,)`): Tokens of each image.
            positions (`torch.Tensor` of shape `(latent_tokens, hidden)`): See `latent_positions`.

        Returns:
            `torch.Tensor` of shape `(latent_tokens, hidden)`.
        """
        embeds = self.vae2llm(latents.to(self.vae2llm.weight.dtype))
        time = self.time_embedder(timesteps.to(latents.device))
        time = time.repeat_interleave(counts.to(time.device), dim=0, output_size=latents.shape[0])
        return embeds + time.to(embeds.device) + positions.to(embeds.device, embeds.dtype)

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
        layout: SequenceLayout | None = None,
        residual_dtype: torch.dtype | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        """See [`BagelForConditionalGeneration.forward`]."""
        if latent_hidden_states is not None:
            return self._with_velocity(BagelModelOutputWithPast(latent_hidden_states=latent_hidden_states))
        image_grid_thw = kwargs.pop("image_grid_thw", None)
        image_grid_hw, latent_grid_hw = host_grids(layout, image_grid_hw, latent_grid_hw, image_grid_thw)
        check_image_inputs(self.config, pixel_values, image_grid_hw, latents, latent_grid_hw, timesteps)
        if input_ids is None and inputs_embeds is None:
            if latents is None or position_ids is None:
                raise ValueError(
                    "Pass `input_ids` or `inputs_embeds`; or, for a denoising step, `latents` with `latent_grid_hw`, "
                    "`timesteps` and `position_ids`."
                )
            return self._denoise(
                latents,
                latent_grid_hw,
                timesteps,
                position_ids,
                past_key_values,
                attention_mask,
                residual_dtype,
                **kwargs,
            )
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`, got both.")
        if isinstance(past_key_values, PrefixCache):
            raise ValueError("A `PrefixCache` serves denoising steps only. Pass a `Cache` as `past_key_values`.")

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if document_ids is not None and attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, -1)
        if layout is None:
            images = [given for given in (pixel_values, image_outputs, latents) if given is not None]
            types = self._token_types(input_ids, inputs_embeds, mm_token_type_ids, document_ids, images)
            if types is not None:
                layout = SequenceLayout.from_inputs(types, image_grid_hw, latent_grid_hw, timesteps, document_ids)
        if past_key_values is not None and not is_torchdynamo_compiling() and past_key_values.get_seq_length() == 0:
            past_key_values.holds_image_blocks = False
        if position_ids is None:
            position_ids = self._default_position_ids(
                layout, inputs_embeds if input_ids is None else input_ids, attention_mask, past_key_values
            )
        elif position_ids.shape[-1] > 1:
            check_position_range(self.config, position_ids)

        if layout is not None and layout.document_ids is not None:
            # Packed samples are never continued.
            use_cache = bool(use_cache)
        # Without latents all tokens take the understanding expert.
        is_frozen = self.config.freeze_und and latents is None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            inputs_embeds = self._embed_sequence(
                layout, input_ids, inputs_embeds, pixel_values, image_outputs, latents, timesteps, **kwargs
            )
            routing = None
            if latents is not None and layout is not None:
                routing = ExpertRouting.from_token_types(
                    layout.token_types, self.config.freeze_und, inputs_embeds.device
                )
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                layout=layout,
                routing=routing,
                residual_dtype=residual_dtype,
                **kwargs,
            )
        outputs.hidden_states = _in_sequence(outputs.hidden_states, routing)
        if outputs.past_key_values is not None and layout is not None and layout.has_blocks:
            outputs.past_key_values.holds_image_blocks = True
        outputs.layout = layout
        return self._with_velocity(outputs)

    def _embed_sequence(
        self,
        layout: SequenceLayout | None,
        input_ids: Any,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_outputs: BaseModelOutputWithPooling | None,
        latents: torch.Tensor | None,
        timesteps: Any,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Embeddings of a sequence, `(batch, tokens, hidden)`, with its images in place of their placeholders."""
        if layout is None:
            return self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        num_patches = 0 if image_outputs is None else sum(map(len, image_outputs.pooler_output))
        num_patches = num_patches if pixel_values is None else len(pixel_values)
        check_placeholders(layout, num_patches, 0 if latents is None else len(latents))
        if inputs_embeds is None:
            # The ids of placeholders are never looked up: a tokenizer may have given them any number.
            is_placeholder = (layout.token_types != TEXT_TOKEN).to(input_ids.device, non_blocking=True)
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_placeholder, 0))
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, layout.image_grid_hw, return_dict=True, **kwargs)
        if image_outputs is not None:
            features = torch.cat(list(image_outputs.pooler_output))
            inputs_embeds = _place(inputs_embeds, layout.token_types == IMAGE_TOKEN, features)
        if latents is not None:
            grid = layout.latent_grid_hw
            embeds = self.embed_latents(latents, timesteps, grid.prod(-1), self.latent_positions(grid))
            inputs_embeds = _place(inputs_embeds, layout.token_types == LATENT_TOKEN, embeds)
        return inputs_embeds

    def _token_types(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        mm_token_type_ids: torch.LongTensor | None,
        document_ids: torch.LongTensor | None,
        images: list[Any],
    ) -> torch.LongTensor | None:
        """Type of each token, or `None` for one sample of text alone."""
        types = mm_token_type_ids
        if types is None and input_ids is not None:
            types = token_types_from_ids(input_ids, self.config.image_token_id, self.config.latent_token_id)
        if types is None and (images or document_ids is not None) and not any(map(len, images)):
            types = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.long)  # type: ignore[index]
        if types is None and images:
            raise ValueError("`inputs_embeds` with images needs `mm_token_type_ids` to tell where the images stand.")
        if types is None or images or document_ids is not None:
            return types
        # A decoding step holds no image; asking the values would cost a synchronisation at every token.
        if types.shape[1] == 1 or is_torchdynamo_compiling():
            return None
        return types if types.any() else None

    def _default_position_ids(
        self,
        layout: SequenceLayout | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.LongTensor | None:
        """Rope positions of a sequence that begins here; `None` where they are the places of the tokens."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        has_blocks = layout is not None and (layout.has_blocks or layout.is_packed)
        if past and (has_blocks or getattr(past_key_values, "holds_image_blocks", False)):
            raise ValueError(
                "`position_ids` must be passed to continue a sequence with images: an image takes one position, "
                "whatever its number of tokens."
            )
        padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if past or (not has_blocks and padding is None):
            if not is_torchdynamo_compiling():
                check_positions_end(self.config, int(past) + tokens.shape[1])
            return None
        if layout is None:
            position_ids = rope_positions(torch.zeros_like(padding, dtype=torch.long), padding)
        else:
            position_ids = layout.position_ids(padding)
        check_position_range(self.config, position_ids)
        return position_ids.to(tokens.device)

    def _denoise(
        self,
        latents: torch.Tensor,
        latent_grid_hw: torch.LongTensor,
        timesteps: torch.Tensor,
        position_ids: torch.LongTensor,
        past_key_values: Cache | PrefixCache | None,
        attention_mask: torch.Tensor | None,
        residual_dtype: torch.dtype | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelModelOutputWithPast:
        lengths = areas(latent_grid_hw)
        if position_ids.numel() != len(lengths):
            raise ValueError(
                f"`position_ids` must hold one position for each of {len(lengths)} images, got {position_ids.numel()}."
            )
        prefix = past_key_values
        if prefix is None:
            prefix = PrefixCache([PrefixView(buffer=None)] * len(lengths))
        elif not isinstance(prefix, PrefixCache):
            prefix = PrefixCache.from_cache(prefix, max(lengths) + 2, attention_mask)
        if len(prefix) != len(lengths):
            raise ValueError(
                f"`past_key_values` holds {len(prefix)} samples, but `latent_grid_hw` describes {len(lengths)} images."
            )
        position_ids = position_ids.flatten().cpu()
        blocks = prefix.get_or_create(
            (latents.device, latent_grid_hw.tolist(), position_ids.tolist(), residual_dtype),
            lambda: self._blocks(latent_grid_hw, position_ids, prefix, latents.device, residual_dtype),
        )
        embeds = self.embed_latents(latents, timesteps, blocks.counts, blocks.latent_positions)
        if isinstance(prefix, SplitPrefixCache):
            embeds = prefix.own_part(embeds)
        markers = self.get_input_embeddings()(blocks.marker_ids).to(embeds.device, embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=torch.cat([markers, embeds]).unsqueeze(0),
            past_key_values=prefix,
            use_cache=False,
            routing=blocks.routing,
            position_embeddings=blocks.position_embeddings,
            residual_dtype=residual_dtype,
            **kwargs,
        )
        outputs.last_hidden_state = None
        if isinstance(prefix, SplitPrefixCache):
            outputs.latent_hidden_states = prefix.gather(outputs.latent_hidden_states)
        return self._with_velocity(outputs)

    def _blocks(
        self,
        latent_grid_hw: torch.LongTensor,
        position_ids: torch.LongTensor,
        prefix: PrefixCache,
        device: torch.device,
        residual_dtype: torch.dtype | None,
    ) -> DenoisingBlocks:
        check_position_range(self.config, position_ids)
        # In the dtype of the embeddings, as the rope.
        latent_positions = self.latent_positions(latent_grid_hw).to(device, self.vae2llm.weight.dtype)
        all_counts = counts = latent_grid_hw.prod(-1)
        if isinstance(prefix, SplitPrefixCache):
            if prefix.lengths != all_counts.tolist():
                raise ValueError(
                    f"`past_key_values` splits blocks of {prefix.lengths} latents, got blocks of {all_counts.tolist()}."
                )
            counts = torch.tensor(prefix.own_lengths())
        routing = ExpertRouting.from_blocks(areas(latent_grid_hw) if counts is all_counts else counts.tolist())
        markers = torch.tensor([self.config.vision_start_token_id, self.config.vision_end_token_id])
        position_ids = torch.cat([position_ids.repeat_interleave(2), position_ids.repeat_interleave(counts)])
        stream = latent_positions.to(residual_dtype or latent_positions.dtype)
        return DenoisingBlocks(
            routing,
            markers.repeat(len(counts)).to(device),
            all_counts.to(device),
            latent_positions,
            self.language_model.rotation(stream, position_ids.unsqueeze(0).to(device), routing),
        )

    def _with_velocity(self, outputs: BagelModelOutputWithPast) -> BagelModelOutputWithPast:
        if outputs.latent_hidden_states is not None:
            outputs.velocity = self.llm2vae(self.language_model.norm_moe_gen(outputs.latent_hidden_states))
        return outputs


def _place(inputs_embeds: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Put features `(tokens, hidden)` into a sequence `(batch, tokens, hidden)` at the places of a mask."""
    places = places.unsqueeze(-1).to(inputs_embeds.device, non_blocking=True)
    return inputs_embeds.masked_scatter(places, features.to(inputs_embeds.device, inputs_embeds.dtype))


def _in_sequence(
    hidden_states: tuple[torch.Tensor | None, ...] | None, routing: ExpertRouting | None
) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states recorded inside the layers, put from expert order into that of the sequence."""
    if hidden_states is None or routing is None:
        return hidden_states
    return tuple(
        states if states is None or states.ndim == 3 else routing.to_sequence(states) for states in hidden_states
    )


class BagelForConditionalGeneration(BagelPreTrainedModel, BagelGenerationMixin):
    """BAGEL with its two heads: next-token scores for text, velocities for image latents."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # `Trainer` would count the targets of one loss only, and divide both by that.
    accepts_loss_kwargs = False

    def __init__(self, config: BagelConfig):
        super().__init__(config)
        self.model = BagelModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self._keys_to_ignore_on_load_unexpected = ignored_weights(config.visual_gen, config.visual_und)
        # `Trainer` loads files into the model without the library's renaming.
        self.register_load_state_dict_pre_hook(rename_weights)
        self.post_init()

    def freeze(self, *parts: str) -> None:
        """See [`~training.freezing.freeze_parts`]."""
        freeze_parts(self, *parts)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hw: torch.LongTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`BagelModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_hw, **kwargs)

    @can_return_tuple
    @by_best_products
    @in_residual_dtype
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
        layout: SequenceLayout | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BagelOutput:
        r"""
        Text, seeing, drawing and training go through this one method.

        A sequence is described by `input_ids` with placeholders, and `pixel_values` and `latents` in the order of
        their placeholders. Without `input_ids` and `inputs_embeds` it is a **denoising step**: `latents` are blocks
        of their own, one a sample of `past_key_values`, which is read and not grown.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + tokens)`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Rope positions; needed after a cache that holds images. For a denoising step `(images,)`: the next
                position of each sample.
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
                Sigma of each latent image in [0, 1]; 0 is clean, a condition.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                0 text, 1 ViT placeholder, 4 latent placeholder; read off `input_ids` by default.
            document_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Sample of each token of a packed sequence, negative at padding; attention never crosses samples.
            noise (`torch.Tensor` of shape `(latent_tokens, latent_dim)`, *optional*):
                Training: mixed into `latents` by `timesteps`; the target of the velocity is `noise - latents`.
            labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Training: token ids where a token is to be predicted from those before it, -100 elsewhere.
            shift_labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Training: instead of `labels`, what each token is to predict, -100 for nothing.
            loss_totals (`torch.FloatTensor` of shape `(2,)`, *optional*):
                Training: what the sums of `ce_loss` and `mse_loss` are divided by, see [`loss_totals`]. By default the
                totals of this batch.
            latent_hidden_states (`torch.Tensor` of shape `(latent_tokens, hidden_size)`, *optional*):
                Instead of everything else: apply only the velocity head to a last layer's output (TaylorSeer).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute the scores of that many last tokens only; 0 means all.
            skip_logits (`bool`, *optional*):
                Leave `logits` out of the output. By default they are left out in training mode with `labels`: the loss
                needs those of its targets only, and all of them are the largest tensor of a training step.
            mm_encoder_outputs (`dict`, *optional*): `{"image": get_image_features(...)}` computed before.
            layout (`SequenceLayout`, *optional*):
                What the collator or the pipeline knows of this very batch on the CPU. Without it, types and grids are
                read back from the device.
            num_items_in_batch (`float` or `torch.Tensor`, *optional*):
                Training: `Trainer`'s name for `loss_totals`; a single number divides the sum of `ce_loss` alone.
            residual_dtype (`torch.dtype`, *optional*):
                Of the hidden states from layer to layer, each of which computes in the type of the weights, which all of
                them have by default. `torch.float32` rounds less: benchmarks of BAGEL run so.
            run_layers (`Callable`, *optional*): What leads through the decoder layers, see [`BagelTextModel.forward`].

        Returns:
            [`BagelOutput`]

        Raises:
            ValueError: if placeholders and images do not match, if an image or the context is too large, or if the
                layout is that of another batch.

        Example:

        ```python
        >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
        ...                                        return_dict=True, return_tensors="pt")
        >>> logits = model(**inputs).logits
        ```
        """
        # No argument by name, since `Trainer` takes each of those with "label" for one that every batch has.
        shift_labels: Any = kwargs.pop("shift_labels", None)
        has_text_loss = labels is not None or shift_labels is not None
        has_loss = has_text_loss or noise is not None
        if noise is not None and (latents is None or timesteps is None or latent_grid_hw is None):
            raise ValueError("`noise` needs `latents`, `latent_grid_hw` and `timesteps` beside it.")
        if layout is not None:
            check_layout(
                layout,
                input_ids if inputs_embeds is None else inputs_embeds,
                timesteps,
                mm_token_type_ids=mm_token_type_ids,
                document_ids=document_ids,
                image_grid_hw=image_grid_hw,
                latent_grid_hw=latent_grid_hw,
                labels=labels,
            )
            if layout.labels is not None and not has_text_loss:
                # `Trainer`'s label smoothing takes the labels out, and would lose the loss of the velocity.
                raise ValueError("`layout` holds labels, but `labels` were not passed. Pass both or neither.")
        if has_loss:
            if input_ids is None and inputs_embeds is None:
                raise ValueError("`labels` and `noise` need the sequence that they belong to. Pass `input_ids`.")
            use_cache = bool(use_cache)
            if self.training:
                # Every rank must use all weights in every step, or the others wait for it (point 34).
                if pixel_values is None and self.config.visual_und:
                    pixel_values, image_grid_hw = self._no_images(self.model.vision_tower.patch_dim)
                if latents is None and self.config.visual_gen:
                    latents, latent_grid_hw = self._no_images(self.config.latent_dim)
                    noise, timesteps = latents, torch.empty(0, device=self.device)
        clean = latents
        if noise is not None and latents is not None:
            counts = latent_grid_hw.prod(-1).to(timesteps.device)
            sigma = timesteps.repeat_interleave(counts, output_size=len(latents)).unsqueeze(-1)
            latents = (1 - sigma) * clean + sigma * noise
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
            layout=layout,
            return_dict=True,
            residual_dtype=residual_dtype,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and has_text_loss
        logits = None
        if outputs.last_hidden_state is not None and not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        losses = Losses()
        if has_loss:
            losses = self._losses(
                outputs,
                labels,
                shift_labels,
                clean,
                noise,
                totals=loss_totals,
                num_items_in_batch=num_items_in_batch,
            )
        return BagelOutput(
            loss=losses.loss,
            ce_loss=losses.ce_loss,
            mse_loss=losses.mse_loss,
            logits=logits,
            velocity=outputs.velocity,
            latent_hidden_states=outputs.latent_hidden_states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _no_images(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed values and grid of no image."""
        return torch.empty(0, dim, device=self.device), torch.empty(0, 2, dtype=torch.long)

    def _losses(
        self,
        outputs: BagelModelOutputWithPast,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        clean: torch.Tensor | None,
        noise: torch.Tensor | None,
        **divisors: Any,
    ) -> Losses:
        layout, reduction = outputs.layout, self.config.loss_reduction
        hidden_states: torch.Tensor = outputs.last_hidden_state
        if layout is None:
            layout = SequenceLayout(torch.zeros(hidden_states.shape[:2], dtype=torch.long))
        text = latent = None
        if labels is not None or shift_labels is not None:
            text = text_loss(hidden_states, self.lm_head, text_targets(labels, layout, reduction, shift_labels))
        if noise is not None:
            latent = latent_loss(outputs.velocity, clean, noise, latent_weights(layout, reduction))
        return mean_losses(self.config, text, latent, **divisors)


__all__ = [
    "BagelForConditionalGeneration",
    "BagelModel",
    "BagelModelOutputWithPast",
    "BagelOutput",
    "BagelPreTrainedModel",
    "BagelTextModel",
    "BagelVisionModel",
]
