# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The published inferencer's interface over this package, for scripts that were written for it (docs/inferencer.md)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from transformers_bagel.errors import shown
from transformers_bagel.image_processing_bagel import resized_size, to_rgb
from transformers_bagel.segments import END, START, THINK_PROMPTS, VISION_END, VISION_START, EncodedSegment, Segment

from .contexts import BagelContext, ContextReader
from .denoising import Denoiser
from .guidance import BagelGuidance
from .inputs import (
    MAX_STEPS,
    check_guidance,
    check_number,
    check_size,
    check_timestep_shift,
    check_whole_number,
)


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Resize:
    """
    The resize of an [`ImageTransform`] (original behaviour, point 24).

    Attributes:
        max_size, min_size (`int`): Bounds of the longest and of the shortest side, in pixels.
        stride (`int`): Both sides become multiples of it.
        max_pixels (`int`): Bound of the area.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int

    def __call__(self, image: Image.Image) -> Image.Image:
        size = resized_size(*image.size, self.max_size, self.min_size, self.stride, self.max_pixels)
        return image.resize(size, resample=Image.Resampling.BICUBIC)


class ImageTransform:
    """
    Sizes of images under the published name.

    Args:
        max_image_size, min_image_size, image_stride, max_pixels (`int`): See [`Resize`].
    """

    def __init__(
        self, max_image_size: int, min_image_size: int, image_stride: int, max_pixels: int = 14 * 14 * 9 * 1024
    ):
        self.stride = image_stride
        self.resize_transform = Resize(max_image_size, min_image_size, image_stride, max_pixels)


class GenContext(dict):
    """What was read, under the published keys. What is in it never changes, so that a copy of it costs nothing."""

    def __init__(self, context: BagelContext):
        super().__init__(kv_lens=[context.length], ropes=[context.next_position], past_key_values=context)

    def __deepcopy__(self, memo: dict[int, Any]) -> GenContext:
        return GenContext(self["past_key_values"])


class InterleaveInferencer:
    """
    What the published class of this name does, and its defaults, by a [`BagelPipeline`].

    Args:
        model ([`BagelPipeline`]): The pipeline, in the place of the published model.
        vae_model, tokenizer, new_token_ids (*optional*):
            In the published order, for callers that stay as they are. They are not read: the pipeline has its own.
        vae_transform, vit_transform ([`ImageTransform`], *optional*):
            Ours or the published ones. By default they have the sizes of the pipeline's processor.

    Attributes:
        vae_sample_mode (`str`): `"sample"`, or `"argmax"` for the mean of what the VAE encodes.

    Example:

    ```python
    >>> inferencer = InterleaveInferencer(pipe)
    >>> inferencer(text="a red circle", cfg_text_scale=4.0, cfg_img_scale=1.0)["image"].save("circle.png")
    >>> inferencer(image=Image.open("circle.png"), text="what is it?", understanding_output=True)["text"]
    ```
    """

    vae_sample_mode = "sample"

    def __init__(
        self,
        model: Any,
        vae_model: Any = None,
        tokenizer: Any = None,
        vae_transform: Any = None,
        vit_transform: Any = None,
        new_token_ids: Any = None,
    ):
        if not all(hasattr(model, name) for name in ("transformer", "processor", "scheduler")):
            raise TypeError(
                "`model` must be a `BagelPipeline`, from `BagelPipeline.from_pretrained` of the checkpoint, got "
                f"{shown(model)}."
            )
        self.pipe = model
        self.model, self.vae_model, self.tokenizer = model.transformer, model.vae, model.processor.tokenizer
        images = model.processor.image_processor
        self.vae_transform = vae_transform or _transform(images.vae_size, images.vae_stride, images.max_pixels)
        self.vit_transform = vit_transform or _transform(images.size, images.patch_size, images.max_pixels)
        for name, stride in (("vae_transform", images.vae_stride), ("vit_transform", images.patch_size)):
            if (given := getattr(self, name).resize_transform.stride) != stride:
                raise ValueError(f"`{name}` must have the model's stride of {stride}, got {given}.")
        tokens = {"bos_token_id": START, "eos_token_id": END}
        tokens |= {"start_of_image": VISION_START, "end_of_image": VISION_END}
        self.new_token_ids = {name: self.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
        # The very same segment for the same text, by which contexts are seen to be equal.
        self._encoded = lru_cache(maxsize=64)(self._encode_text)

    def init_gen_context(self) -> GenContext:
        """A context in which nothing was read."""
        return GenContext(BagelContext())

    @torch.no_grad()
    def update_context_text(self, text: str, gen_context: GenContext) -> GenContext:
        """Read a text into a context, which is changed and returned."""
        return self._read(gen_context, [self._encoded(text)])

    @torch.no_grad()
    def update_context_image(
        self, image: Image.Image, gen_context: GenContext, vae: bool = True, vit: bool = True
    ) -> GenContext:
        """
        Read an image into a context, which is changed and returned.

        Args:
            image (`PIL.Image.Image`): Is resized for the VAE and, as it was given, for the ViT.
            gen_context (`GenContext`): What was read before.
            vae, vit (`bool`): Whether it is read as latents, from which pictures are drawn, and whether it is seen.

        Raises:
            ValueError: if it is to be read in no way.
        """
        if not (vae or vit):
            raise ValueError("`vae` and `vit` are both false: the image would not be read. Pass one of them.")
        segments = []
        if vae:
            (segment,) = self._encode_image("vae_image", image, "vae_size", self.vae_transform)
            latents = self.pipe.encode_image(segment.pixels, None, self.vae_sample_mode)
            segments.append(replace(segment, latents=latents))
        if vit:
            segments += self._encode_image("vit_image", image, "size", self.vit_transform)
        return self._read(gen_context, segments)

    @torch.no_grad()
    def gen_image(
        self,
        image_shape: Sequence[int],
        gen_context: GenContext,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.5,
        cfg_text_precontext: GenContext | None = None,
        cfg_img_precontext: GenContext | None = None,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
        enable_taylorseer: bool = False,
    ) -> Image.Image:
        """
        Draw from a context. The noise is torch's own, as `torch.manual_seed` sets it.

        Args:
            image_shape (`Sequence[int]`): Height and width in pixels.
            gen_context (`GenContext`): What is drawn from.
            cfg_text_scale, cfg_img_scale (`float`): Weights of the last text, and of the images; at most 1 turns it off.
            cfg_text_precontext, cfg_img_precontext (`GenContext`, *optional*):
                What guidance compares with: without the last text, and without images. Needed where the scale is above 1.
            cfg_interval, cfg_renorm_min, cfg_renorm_type: Of guidance, see [`BagelPipeline.__call__`].
            num_timesteps (`int`): One more than there are steps.
            timestep_shift (`float`): Of the noise levels.
            enable_taylorseer (`bool`): Whether most steps are predicted. It is off afterwards, other than in the original.

        Raises:
            TypeError, ValueError: for settings that cannot work.
        """
        _check_shape(self.pipe, image_shape)
        _check_steps(self.pipe, num_timesteps, timestep_shift)
        check_guidance(cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_type, cfg_renorm_min)
        if (few_steps := self.pipe.few_steps) is not None:
            chosen: dict[str, Any] = {"num_inference_steps": num_timesteps - 1, "timestep_shift": timestep_shift}
            chosen |= {"guidance_scale": cfg_text_scale}
            if cfg_text_scale > 1:
                chosen["image_guidance_scale"] = cfg_img_scale
            # The published defaults stay what they are.
            few_steps.warn_of(chosen, self.pipe.scheduler)
        low, high = cfg_interval
        guidance = BagelGuidance(cfg_text_scale, cfg_img_scale, (low, high), cfg_renorm_type, cfg_renorm_min)
        contexts = {"full": gen_context["past_key_values"]}
        given = {"no_text": (cfg_text_precontext, True), "no_image": (cfg_img_precontext, cfg_img_scale > 1)}
        for name, (compared, is_needed) in given.items():
            if cfg_text_scale > 1 and is_needed:
                if compared is None:
                    argument = {"no_text": "cfg_text_precontext", "no_image": "cfg_img_precontext"}[name]
                    raise ValueError(f"`{argument}` is needed for guidance. Pass it, or a scale of 1.")
                context = compared["past_key_values"]
                # One object is computed once.
                equals = [own for own in contexts.values() if own.begins(context) and context.begins(own)]
                contexts[name] = equals[0] if equals else context
        pipe = copy.copy(self.pipe)
        if enable_taylorseer:
            pipe.enable_taylorseer()
        else:
            pipe.disable_taylorseer()
        height, width = image_shape
        grid = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        denoiser = Denoiser(pipe.transformer, [contexts], [grid], [guidance], pipe._caching)
        noise, call = pipe.prepare_latents([grid], [None]), pipe._new_call(cfg_text_scale, None, timestep_shift)
        loop = pipe._prepare_loop(call, denoiser, noise, num_timesteps - 1, None)
        with pipe.progress_bar(total=len(loop)) as progress_bar:
            for _ in loop:
                progress_bar.update()
        return self.decode_image(loop.latents, image_shape)

    @torch.no_grad()
    def decode_image(self, latent: torch.Tensor, image_shape: Sequence[int]) -> Image.Image:
        """The picture of packed latents `(tokens, latent_dim)` of a height and width in pixels."""
        rows, columns = (side // self.pipe.vae_scale_factor for side in image_shape)
        return self.pipe.decode_latents(latent.reshape(1, rows * columns, -1), (rows, columns))[0]

    @torch.no_grad()
    def gen_text(
        self, gen_context: GenContext, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0
    ) -> str:
        """
        What the model writes behind a context, which stays as it is.

        Args:
            gen_context (`GenContext`): What was read.
            max_length (`int`): Steps, the one that feeds the start token included: one more than there are tokens.
            do_sample (`bool`): Whether tokens are drawn, with torch's own random numbers, instead of the likeliest.
            temperature (`float`): Of drawing them. Nothing else counts, whatever the generation config says.
        """
        _check_text(max_length, do_sample, temperature)
        context = gen_context["past_key_values"]
        (text,) = self._reader().write([context], max_length - 1, do_sample, temperature, temperature_only=True)
        return text

    @torch.no_grad()
    def interleave_inference(
        self,
        input_lists: Sequence[str | Image.Image],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        cfg_text_scale: float = 3.0,
        cfg_img_scale: float = 1.5,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        image_shapes: Sequence[int] = (1024, 1024),
        enable_taylorseer: bool = False,
    ) -> list[str | Image.Image]:
        """
        Answer texts and images in words or with a picture.

        Args:
            input_lists (`Sequence[str | PIL.Image.Image]`): Texts and images in their order.
            think (`bool`): Whether the model thinks first.
            understanding_output (`bool`): Whether the answer is a text; images are then seen only.
            max_think_token_n (`int`): Steps of the text, also of an answer.
            do_sample, text_temperature: Of the text.
            cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type: See `gen_image`.
            timestep_shift, num_timesteps, enable_taylorseer: See `gen_image`.
            image_shapes (`Sequence[int]`): Height and width of the picture, if there is no image among the inputs.

        Returns:
            `list[str | PIL.Image.Image]`: The text; or the picture, behind what was thought, if anything was.

        Raises:
            TypeError, ValueError: for inputs and settings that cannot work.
        """
        for item in input_lists:
            if not isinstance(item, (str, Image.Image)):
                raise ValueError(f"`input_lists` must hold texts and PIL images, got {shown(item)}.")
        # Before anything is read.
        _check_text(max_think_token_n, do_sample, text_temperature)
        if not understanding_output:
            if not any(isinstance(item, Image.Image) for item in input_lists):
                _check_shape(self.pipe, image_shapes)
            _check_steps(self.pipe, num_timesteps, timestep_shift)
            check_guidance(cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_type, cfg_renorm_min)
        texts: dict[str, Any] = {
            "do_sample": do_sample,
            "temperature": text_temperature,
            "max_length": max_think_token_n,
        }
        full, no_text, no_image = (self.init_gen_context() for _ in range(3))
        try:
            if think:
                prompt = THINK_PROMPTS["text" if understanding_output else "image"]
                full, no_image = (self.update_context_text(prompt, context) for context in (full, no_image))
            for item in input_lists:
                if isinstance(item, str):
                    no_text = copy.deepcopy(full)
                    full, no_image = (self.update_context_text(item, context) for context in (full, no_image))
                else:
                    image = self.vae_transform.resize_transform(to_rgb(item))
                    full = self.update_context_image(image, full, vae=not understanding_output)
                    image_shapes = image.size[::-1]
                    no_text = copy.deepcopy(full)
            if understanding_output:
                return [self.gen_text(full, **texts)]
            thoughts = [self.gen_text(full, **texts)] if think else []
            for thought in thoughts:
                full = self.update_context_text(thought, full)
            picture = self.gen_image(
                image_shapes,
                full,
                cfg_text_precontext=no_text,
                cfg_img_precontext=no_image,
                cfg_text_scale=cfg_text_scale,
                cfg_img_scale=cfg_img_scale,
                cfg_interval=cfg_interval,
                cfg_renorm_min=cfg_renorm_min,
                cfg_renorm_type=cfg_renorm_type,
                timestep_shift=timestep_shift,
                num_timesteps=num_timesteps,
                enable_taylorseer=enable_taylorseer,
            )
            return [*thoughts, picture]
        finally:
            self.pipe.maybe_free_model_hooks()

    def __call__(self, image: Image.Image | None = None, text: str | None = None, **kargs: Any) -> dict[str, Any]:
        """
        Answer an image, a text, or a text behind an image.

        Args:
            image (`PIL.Image.Image`, *optional*), text (`str`, *optional*): What is answered.
            kargs: Settings of [`interleave_inference`].

        Returns:
            `dict`: `"image"` and `"text"`, each `None` if there is none. Without any input both are, and a warning says so.
        """
        inputs = [item for item in (image, text) if item is not None]
        answer: dict[str, Any] = {"image": None, "text": None}
        if not inputs:
            logger.warning("There is nothing to answer: pass `image`, `text`, or both.")
            return answer
        for item in self.interleave_inference(inputs, **kargs):
            answer["text" if isinstance(item, str) else "image"] = item
        return answer

    def _reader(self) -> ContextReader:
        return ContextReader(self.pipe.transformer, self.pipe.processor, self.pipe._execution_device)

    def _read(self, gen_context: GenContext, segments: list[EncodedSegment]) -> GenContext:
        (context,) = self._reader().read([gen_context["past_key_values"]], [segments])
        gen_context.update(GenContext(context))
        return gen_context

    def _encode_text(self, text: str) -> EncodedSegment:
        return self.pipe.processor.encode_segments([Segment("text", text)])[0]

    def _encode_image(self, kind: str, image: Image.Image, size: str, transform: Any) -> list[EncodedSegment]:
        bounds = transform.resize_transform
        edges = {"longest_edge": bounds.max_size, "shortest_edge": bounds.min_size}
        settings = {size: edges, "max_pixels": bounds.max_pixels, "resize_before_vit": False}
        return self.pipe._encode_segments([Segment(kind, image)], **settings)


def _transform(size: Any, stride: int, max_pixels: int) -> ImageTransform:
    return ImageTransform(size["longest_edge"], size["shortest_edge"], stride, max_pixels)


def _check_text(max_length: Any, do_sample: Any, temperature: Any) -> None:
    check_whole_number("max_length", max_length, 2)
    # The likeliest tokens have none, whatever a script says of it.
    check_number("temperature", temperature, 1e-6 if do_sample else 0)


def _check_shape(pipe: Any, image_shape: Any) -> None:
    if not isinstance(image_shape, (list, tuple)) or len(image_shape) != 2:
        raise TypeError(f"`image_shape` must be a height and a width, got {shown(image_shape)}.")
    limit = None if pipe.interpolate_pos else pipe.max_latent_size * pipe.vae_scale_factor
    for side in image_shape:
        check_size("image_shape", side, pipe.vae_scale_factor, limit)


def _check_steps(pipe: Any, num_timesteps: Any, timestep_shift: Any) -> None:
    check_whole_number("num_timesteps", num_timesteps, 2, MAX_STEPS + 1)
    check_timestep_shift(timestep_shift, pipe.scheduler)
