# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What `generate()` must know about BAGEL: positions inside images, masks of blocks, and a cache that goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .assisting import TextAssistant
from .cache import GrowingCache
from .checks import check_image_inputs, check_placeholders, check_position_range
from .errors import shown
from .segments import IMAGE_TOKEN, LATENT_TOKEN, TEXT_TOKEN
from .sequence import (
    SequenceLayout,
    blocks_per_sample,
    grids_of_frames,
    image_block_ids,
    rope_positions,
    token_types_from_ids,
)


LATENT_INPUTS = ("latents", "latent_grid_hw", "timesteps")


class BagelGenerationMixin(GenerationMixin):
    """
    [`GenerationMixin`] for sequences whose images take one rope position each.

    Attributes:
        decoding_settings (`dict`, *optional*):
            What `generate()` takes instead of a [`GrowingCache`], but for what a call says itself. Not where it names the kind
            of cache, nor where it hands out the cache, which is to go on growing.
    """

    decoding_settings: dict[str, Any] | None = None

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """
        As [`GenerationMixin.generate`], with a [`GrowingCache`] where it would make a `DynamicCache`.

        Args:
            inputs, generation_config, kwargs: As the parent's.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"image"` draws pictures instead, see [`diffusers_bagel.any_to_any.draw`].

        Raises:
            TypeError: for an assistant that is no model.
            ValueError: for images that do not fit the prompt or the model, before they are encoded; for an assistant of
                another tokenizer.
        """
        mode = kwargs.pop("generation_mode", None) or "text"
        if mode not in self.output_modalities:
            raise ValueError(
                f"`generation_mode` must be one of {', '.join(self.output_modalities)}, got {shown(mode)}."
            )
        if mode == "image":
            return self._draw(inputs, generation_config, kwargs)
        # The library takes from the model what a configuration leaves open.
        configs = (
            [self.generation_config] if generation_config is None else [generation_config, self.generation_config]
        )

        def said(name: str) -> Any:
            values = [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
            return next((value for value in values if value is not None), None)

        if "image_grid_thw" in kwargs:
            kwargs["image_grid_hw"] = grids_of_frames(kwargs.get("image_grid_hw"), kwargs.pop("image_grid_thw"))
        use_cache = said("use_cache")
        if not isinstance(use_cache, bool) and ("use_cache" in kwargs or use_cache is not None):
            # What is false and not `False` has a cache made, into which everything is fed again at every token.
            use_cache = kwargs["use_cache"] = use_cache is None or bool(use_cache)
        ids, types = kwargs.get("input_ids"), kwargs.get("mm_token_type_ids")
        ids = inputs if ids is None else ids
        if ids is not None and types is not None and ids.ndim == 2 and types.shape[1] < ids.shape[1]:
            # Those of the prompt, when what was generated goes on: it is text.
            kwargs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        if (
            kwargs.get("vae_pixel_values") is not None
            and ids is not None
            and not (ids == self.config.latent_token_id).any()
        ):
            # An any-to-any pipeline has them in all of its inputs, in case that a picture is asked for.
            del kwargs["vae_pixel_values"]
        self._check_images(kwargs, said("prefill_chunk_size"))
        if said("assistant_early_exit") is not None:
            raise ValueError(
                f"`assistant_early_exit={said('assistant_early_exit')}` needs a model that was trained to stop at any "
                "layer, and BAGEL was not: pass `assistant_model` or `prompt_lookup_num_tokens`."
            )
        assistant = kwargs.get("assistant_model")
        if assistant is not None and not isinstance(assistant, torch.nn.Module):
            raise TypeError(f"`assistant_model` must be a model, got {shown(assistant)}.")
        if assistant is not None and not isinstance(assistant, BagelGenerationMixin):
            kwargs["assistant_model"] = self._text_assistant(assistant, ids, kwargs)
        kind = said("cache_implementation")
        is_default = kind in (None, "dynamic") and use_cache is not False
        if is_default and kwargs.get("past_key_values") is None and not said("is_assistant"):
            has_candidates = assistant is not None or said("prompt_lookup_num_tokens") is not None
            is_asked_for = kind is not None or said("return_dict_in_generate")
            if self.decoding_settings is None or has_candidates or is_asked_for:
                kwargs["past_key_values"] = GrowingCache(self.config)
                if kind is not None:
                    # The library refuses a cache beside the name of one.
                    kwargs["cache_implementation"] = None
            else:
                left = {name: value for name, value in self.decoding_settings.items() if said(name) is None}
                generation_config = _with_settings(generation_config, kwargs, left)
        return super().generate(inputs, generation_config, **kwargs)

    def _text_assistant(
        self, assistant: PreTrainedModel, input_ids: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> TextAssistant:
        vocab_size = self.config.get_text_config().vocab_size
        if model_kwargs.get("assistant_tokenizer") is not None:
            for name, size in (
                ("tokenizer", vocab_size),
                ("assistant_tokenizer", assistant.config.get_text_config().vocab_size),
            ):
                if (tokenizer := model_kwargs.get(name)) is not None and len(tokenizer) > size:
                    raise ValueError(
                        f"`{name}` has {len(tokenizer)} tokens and its model {size}: pass the model's own one."
                    )
            return TextAssistant(assistant, vocab_size, None)
        types = self._full_token_types(input_ids, model_kwargs.get("mm_token_type_ids"))
        if input_ids is None or types is None:
            raise ValueError("`assistant_model` reads words: pass the prompt as `input_ids`, not as `inputs_embeds`.")
        is_word = types == TEXT_TOKEN
        if model_kwargs.get("attention_mask") is not None:
            is_word = is_word & (model_kwargs["attention_mask"] != 0)
        return TextAssistant(assistant, vocab_size, is_word)

    def _draw(self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict) -> Any:
        # Only here: text needs no diffusers.
        from diffusers_bagel.any_to_any import draw

        for name in ("mm_token_type_ids", "pixel_values", "image_grid_hw"):
            kwargs.pop(name, None)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise ValueError('`input_ids` are needed by `generation_mode="image"`.')
        return draw(self, input_ids, generation_config=generation_config, **kwargs)

    def _check_images(self, model_kwargs: dict[str, Any], prefill_chunk_size: int | None) -> None:
        has_images = any(
            model_kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs", "latents")
        )
        if prefill_chunk_size is not None and has_images:
            raise ValueError(
                f"`prefill_chunk_size={prefill_chunk_size}` would cut through an image, whose tokens must be seen "
                "together. Leave `prefill_chunk_size` unset for prompts with images."
            )
        names = ("pixel_values", "image_grid_hw", "latents", "latent_grid_hw", "timesteps")
        check_image_inputs(self.config, *(model_kwargs.get(name) for name in names))
        types = self._full_token_types(model_kwargs.get("input_ids"), model_kwargs.get("mm_token_type_ids"))
        if model_kwargs.get("pixel_values") is not None and types is not None:
            latents = model_kwargs.get("latents")
            layout = SequenceLayout(types.cpu())
            check_placeholders(layout, len(model_kwargs["pixel_values"]), 0 if latents is None else len(latents))

    def _full_token_types(
        self, input_ids: torch.Tensor | None, mm_token_type_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        if mm_token_type_ids is not None or input_ids is None or input_ids.is_floating_point():
            return mm_token_type_ids
        return token_types_from_ids(input_ids, self.config.image_token_id, self.config.latent_token_id)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor
        types = self._full_token_types(input_ids, model_kwargs.get("mm_token_type_ids"))
        attention_mask = model_kwargs.get("attention_mask")
        cache: Cache | None = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        full_length = past + 1 if attention_mask is None else attention_mask.shape[1]
        if types is None or (past and types.shape[1] < full_length):
            if getattr(cache, "holds_image_blocks", False) or (past and types is not None and bool(types.any())):
                raise ValueError(
                    "To continue from `past_key_values` that hold images, pass the whole conversation "
                    "(`input_ids` and `mm_token_type_ids` of full length), or `position_ids`."
                )
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        position_ids = rope_positions(types, attention_mask)
        check_position_range(self.config, position_ids)
        return position_ids

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Like the parent's; an image is fed together with its placeholders, and once."""
        types = self._full_token_types(input_ids, kwargs.get("mm_token_type_ids"))
        if types is not None and types.shape[1] < input_ids.shape[1]:
            # Assisted decoding lengthens the ids by its candidates, and not the types.
            types = torch.nn.functional.pad(types, (0, input_ids.shape[1] - types.shape[1]))
        if types is not None and (inputs_embeds is None or kwargs.get("mm_token_type_ids") is not None):
            # Also where they were left out: the mask of a static cache is made from them alone.
            kwargs["mm_token_type_ids"] = types
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        positions = kwargs.get("position_ids")
        is_whole = positions is not None and positions.shape[-1] == input_ids.shape[1] > past
        if next_sequence_length is None and is_first_iteration and is_whole:
            # Assisted decoding would feed all of a conversation, also behind a cache that holds its beginning.
            next_sequence_length = input_ids.shape[1] - past
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        fed = model_inputs.get("input_ids")
        fed_length = (model_inputs["inputs_embeds"] if fed is None else fed).shape[1]
        images = {
            name: kwargs[name] for name in ("mm_encoder_outputs", *LATENT_INPUTS) if kwargs.get(name) is not None
        }
        for name in images:
            model_inputs.pop(name, None)
        if images and types is not None and fed_length > 1 and types[:, -fed_length:].any():
            # Also for an assistant, whose prefill the library does not count as a first iteration.
            model_inputs |= _images_behind(images, types, types.shape[1] - fed_length)
        return model_inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        packed = {key: model_kwargs.pop(key) for key in LATENT_INPUTS if model_kwargs.get(key) is not None}
        if packed and expand_size > 1:
            types = self._full_token_types(input_ids, model_kwargs.get("mm_token_type_ids"))
            per_sample = blocks_per_sample(types, LATENT_TOKEN)
            images = list(range(int(per_sample.sum())))
            of_samples = torch.tensor(images).split(per_sample.tolist())
            repeated = torch.cat([own.repeat(expand_size) for own in of_samples])
            pieces = packed["latents"].split(packed["latent_grid_hw"].prod(-1).tolist())
            packed["latents"] = torch.cat([pieces[index] for index in repeated.tolist()])
            for key in ("latent_grid_hw", "timesteps"):
                packed[key] = packed[key][repeated.to(packed[key].device)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | packed

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> Any:
        """Mask of a forward with a static cache; the blocks follow from the token types."""
        blocks = None
        if mm_token_type_ids is not None and mm_token_type_ids.shape[1] > 1:
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            blocks = torch.nn.functional.pad(image_block_ids(mm_token_type_ids), (past, 0), value=-1)
        return create_causal_mask(
            config.get_text_config(),
            inputs_embeds,
            attention_mask,
            past_key_values,
            position_ids=None,
            block_sequence_ids=blocks,
        )


def _images_behind(images: dict[str, Any], types: torch.Tensor, cached: int) -> dict[str, Any]:
    """The encoded images and latents without those whose blocks lie in the first `cached` tokens."""
    kept: dict[str, Any] = {}
    image_outputs = images.get("mm_encoder_outputs", {}).get("image")
    if image_outputs is not None:
        keep = _blocks_left(types, IMAGE_TOKEN, cached)
        features = [features for features, kept in zip(image_outputs.pooler_output, keep, strict=True) if kept]
        if features:
            kept["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tuple(features))}
    if "latents" in images:
        keep = _blocks_left(types, LATENT_TOKEN, cached)
        pieces = images["latents"].split(images["latent_grid_hw"].prod(-1).tolist())
        if any(keep):
            kept["latents"] = torch.cat([piece for piece, kept in zip(pieces, keep, strict=True) if kept])
            for name in ("latent_grid_hw", "timesteps"):
                kept[name] = images[name][torch.tensor(keep, device=images[name].device)]
    return kept


def _blocks_left(types: torch.Tensor, kind: int, cached: int) -> list[bool]:
    """For each image of one kind, sample by sample: whether its block lies behind the first `cached` tokens."""
    total, before = blocks_per_sample(types, kind).tolist(), blocks_per_sample(types[:, :cached], kind).tolist()
    return [index >= seen for count, seen in zip(total, before, strict=True) for index in range(count)]


def _with_settings(
    generation_config: GenerationConfig | None, kwargs: dict[str, Any], settings: dict[str, Any]
) -> GenerationConfig | None:
    """Say something where the caller said the rest, a copy of his configuration or `kwargs`: the library wants it in one place."""
    if generation_config is None or kwargs.keys() & settings.keys():
        kwargs |= settings
        return generation_config
    generation_config = copy.deepcopy(generation_config)
    generation_config.update(**settings)
    return generation_config
