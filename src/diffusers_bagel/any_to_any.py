# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`generate(generation_mode="image")`: pictures from a model's inputs, as transformers' any-to-any pipeline asks for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.errors import some
from transformers_bagel.image_processing_bagel import image_from_array
from transformers_bagel.segments import END, SPECIAL_TOKENS, START, VISION_END, VISION_START

from .pipeline_bagel import BagelPipeline


# Settings of the pipeline's call that follow from the inputs.
_GIVEN = {"self", "prompt", "image", "messages", "output_type", "return_dict"}
DRAWING_SETTINGS = inspect.signature(BagelPipeline.__call__).parameters.keys() - _GIVEN

# The other components of a model's pipeline. Not the pipeline, which would keep its model.
_components: WeakKeyDictionary[BagelForConditionalGeneration, dict[str, Any]] = WeakKeyDictionary()


def draw(
    model: BagelForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    vae_pixel_values: Sequence[Any] | None = None,
    generation_config: GenerationConfig | None = None,
    **settings: Any,
) -> torch.Tensor | list[torch.Tensor] | GenerateDecoderOnlyOutput:
    """
    Pictures, as [`BagelPipeline`] draws them with the components that lie beside the model.

    Args:
        model ([`BagelForConditionalGeneration`]): Loaded by `from_pretrained` from where a VAE lies, too.
        input_ids (`torch.LongTensor` of shape `(batch, tokens)`): Conversations, with a generation prompt or without.
        attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 0 at padding.
        vae_pixel_values (`Sequence`, *optional*): Of each image `(3, height, width)`, or lists of them for each conversation.
        generation_config ([`GenerationConfig`], *optional*):
            Of which `guidance_scale` and `return_dict_in_generate` are read.
        settings: Of the pipeline's call, with `num_return_sequences` for its `num_images_per_prompt`. Those of
            text generation are for texts.

    Returns:
        `torch.FloatTensor` of shape `(images, 3, height, width)` in [0, 1], or a list where the sizes differ; with
        `return_dict_in_generate=True` as `sequences` of an output.

    Raises:
        ValueError: for unknown settings, for images without pixels, or if the model's folder is not known.
    """
    returns_dict = settings.get(
        "return_dict_in_generate", getattr(generation_config, "return_dict_in_generate", False)
    )
    settings = _drawing_settings(generation_config, settings)
    pipe = _pipeline(model)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    samples = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
    images = [_image(pixels, pipe.processor) for pixels in _flat(vae_pixel_values or ())]
    seen = sum(ids.count(pipe.processor.tokenizer.convert_tokens_to_ids(VISION_END)) for ids in samples)
    if seen and not images:
        raise ValueError(
            "`vae_pixel_values` of the images are missing, from which a picture begins. Load the processor with "
            "`BagelProcessor.from_pretrained(..., return_vae_pixel_values=True)`."
        )
    rest = iter(images)
    messages = [[{"role": "user", "content": list(_parts(ids, rest, pipe.processor))}] for ids in samples]
    pictures = pipe(messages=messages, output_type="pt", **settings).images
    return GenerateDecoderOnlyOutput(sequences=pictures) if returns_dict else pictures


def _drawing_settings(generation_config: GenerationConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in settings.items() if name in DRAWING_SETTINGS}
    given = {name for name, value in settings.items() if value is not None}
    unknown = [name for name in given - known.keys() if not hasattr(GenerationConfig, name)]
    unknown = [name for name in unknown if name not in GenerationConfig().to_dict()]
    if unknown:
        raise ValueError(
            f"{some(sorted(unknown))}: known settings of a picture are {', '.join(sorted(DRAWING_SETTINGS))}."
        )
    if settings.get("num_return_sequences") is not None:
        known.setdefault("num_images_per_prompt", settings["num_return_sequences"])
    scale = getattr(generation_config, "guidance_scale", None)
    return known if scale is None else {"guidance_scale": scale} | known


def _pipeline(model: BagelForConditionalGeneration) -> BagelPipeline:
    if model not in _components:
        if not model.name_or_path:
            raise ValueError(
                "A picture needs the VAE beside the model's weights, and this model was not loaded from anywhere. Use "
                "`from_pretrained`, or draw with `diffusers_bagel.BagelPipeline`."
            )
        revision = getattr(model.config, "_commit_hash", None)
        pipe = BagelPipeline.from_pretrained(
            model.name_or_path, transformer=model, dtype=model.dtype, **({"revision": revision} if revision else {})
        )
        pipe.vae.to(model.device)
        _components[model] = {name: pipe.components[name] for name in ("vae", "scheduler", "processor")}
    pipe = BagelPipeline(transformer=model, **_components[model])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flat(pixels: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The pixels of each image: pipelines batch what is a list for each conversation as lists in a list."""
    for item in pixels:
        yield from [item] if isinstance(item, torch.Tensor) else item


def _image(pixels: torch.Tensor, processor: BagelProcessor) -> Image.Image:
    """The image whose normalised pixels `(3, height, width)` these are."""
    settings = processor.image_processor
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.image_mean, settings.image_std))
    return image_from_array((pixels.float().cpu() * std + mean).clamp(0, 1))


def _parts(ids: Sequence[int], images: Iterator[Image.Image], processor: BagelProcessor) -> Iterator[dict[str, Any]]:
    """Parts of a message from the tokens of a conversation; words outside of all markers are a text, too."""
    tokenizer = processor.tokenizer
    start, end, vision_start, vision_end = tokenizer.convert_tokens_to_ids([START, END, VISION_START, VISION_END])
    buffer: list[int] = []
    for token in [*ids, start]:
        if token in (end, start, vision_start) and (buffer or token == end):
            text = tokenizer.decode(buffer)
            if any(special in text for special in SPECIAL_TOKENS.values()):
                raise ValueError("Special tokens as words cannot be drawn. Take them out of the text.")
            yield {"type": "text", "text": text}
            buffer = []
        if token == vision_end:
            # The image's latents come before what is seen of it, and stand for the same image.
            if processor.image_token_id in buffer:
                yield {"type": "image", "image": next(images)}
            buffer = []
        elif token not in (start, end, vision_start):
            buffer.append(token)
