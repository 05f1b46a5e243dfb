# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Draw and edit with BAGEL: contexts, guidance, flow matching, decoding."""

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from transformers_bagel import BagelForConditionalGeneration, BagelProcessor
from transformers_bagel.destinations import destination
from transformers_bagel.errors import shown
from transformers_bagel.image_processing_bagel import patchify, unpatchify
from transformers_bagel.latents import VAE_SAMPLE_MODES, decode_latents, encode_posterior, scale_latents
from transformers_bagel.segments import EncodedSegment, Segment, chat_segments

from .adapter_scale import check_adapter_scale
from .compiling import CompileMixin
from .contexts import BagelContext, ContextReader
from .denoising import Denoiser, DenoisingLoop
from .few_steps import FewSteps
from .guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from .inputs import (
    MAX_IMAGES_PER_PROMPT,
    MAX_STEPS,
    SIZE_RULES,
    as_conversations,
    as_generators,
    check_callback,
    check_callback_outputs,
    check_choice,
    check_flag,
    check_guidance,
    check_guidance_tolerance,
    check_images_kwargs,
    check_latents,
    check_number,
    check_output_type,
    check_prompt,
    check_scheduler,
    check_sigmas,
    check_size,
    check_timestep_shift,
    check_whole_number,
    takes_sigmas,
    with_plain_numbers,
    with_residual_dtype,
)
from .loading import CheckedDownloadMixin, load_original_components, name_own_modules, settled
from .lora import BagelLoraLoaderMixin, check_no_adapters
from .memory import cast_layers, pipeline_quantization
from .pipeline_output import BagelPipelineOutput
from .presets import Preset, with_defaults
from .prompt_contexts import guidance_contexts, read_once, share_segments
from .randomness import draw_seed
from .step_caches import StepCacheMixin


logger = logging.get_logger(__name__)

ImageInput: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | str

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_bagel import BagelPipeline

        >>> pipe = BagelPipeline.from_pretrained("ByteDance-Seed/BAGEL-7B-MoT", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a red circle on a white background").images[0]
        >>> image = pipe("make the circle green", image=image).images[0]
        >>> image.save("green.png")
        ```
"""


class BagelPipeline(CheckedDownloadMixin, DiffusionPipeline, BagelLoraLoaderMixin, StepCacheMixin, CompileMixin):
    r"""
    Pipeline for text-to-image generation and image editing with BAGEL.

    A call keeps what belongs to it, its scheduler included, on a copy of the pipeline, which is what callbacks get. So
    threads may share one pipeline.

    Args:
        transformer ([`BagelForConditionalGeneration`]):
            The model. The pipeline uses it through `forward` and `generate` only.
        vae ([`AutoencoderKL`]): FLUX's VAE. `None` beside a transformer without `visual_gen`, for sessions that only talk.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): With `shift=3.0` in the original checkpoint.
        processor ([`BagelProcessor`]): Reads prompts, messages and images.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    # Of a call, on its copy of the pipeline.
    _guidance_scale: float = 1.0
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    # `time.monotonic()`: a call stops when it is asked to after it began, whatever call begins in between.
    _started_at: float = 0.0
    _interrupted_at: float = -1.0

    def __init__(
        self,
        transformer: BagelForConditionalGeneration,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        processor: BagelProcessor,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, processor=processor)
        config = getattr(getattr(self, "transformer", None), "config", None)
        if vae is not None:
            self._check_that_it_draws()
        self.latent_patch_size = config.latent_patch_size if config is not None else 2
        self.vae_scale_factor = config.latent_stride if config is not None else 16
        self.latent_dim = config.latent_dim if config is not None else 64
        self.max_latent_size = config.max_latent_size if config is not None else 64
        self.interpolate_pos = config.interpolate_pos if config is not None else False
        self.default_sample_size = min(1024, self.max_latent_size * self.vae_scale_factor)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, resample="bicubic")
        self._split_group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BagelPipeline":
        r"""
        Load a pipeline from a Hub repository or a directory, in diffusers' layout or in the original one.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or directory.
            kwargs: As in [`DiffusionPipeline.from_pretrained`]: `dtype`, `device_map`, `revision`, components by name.
                `quantization_config` may be a [`PipelineQuantizationConfig`] or that of the transformer. `base`, another
                repository or directory, has the settings, the tokenizer and the VAE if there are weights alone.

        Raises:
            OSError: if there is no checkpoint.
            ValueError: if `quantization_config` is something else, or does not fit.
        """
        path, quantization = pretrained_model_name_or_path, kwargs.get("quantization_config")
        if quantization is not None:
            quantization = kwargs["quantization_config"] = pipeline_quantization(quantization)
        path, hub, kwargs, is_original = settled(path, kwargs)
        if not is_original:
            return super().from_pretrained(path, **kwargs)
        pipe = cls(**load_original_components(path, hub, **kwargs))
        if quantization is not None:
            pipe.quantization_config = quantization
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like the parent's, for repositories whose model_index.json names our classes as those of transformers."""
        return super().extract_init_dict(name_own_modules(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """See [`DiffusionPipeline.save_pretrained`].

        Raises:
            OSError: if the folder is a file, or cannot be written to.
            ValueError: if the transformer has adapters, before anything is written.
        """
        destination(save_directory, "`save_directory`")
        check_no_adapters(self.transformer)
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_layerwise_casting(self, storage_dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        """
        Keep the transformer's attention and MLP layers in a small type, and cast each to the transformer's own type
        while it computes. It cannot be undone.

        Args:
            storage_dtype (`torch.dtype`, *optional*, defaults to `torch.float8_e4m3fn`): Of the layers at rest.

        Raises:
            ValueError: if the transformer is quantised.
        """
        cast_layers(self.transformer, storage_dtype)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Like the parent's, without the pipeline code of a repository: all that it does is import this class."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    def enable_context_split(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """
        Draw every image with several processes, each of which computes a part of its latents.

        All of them must make the same calls, with generators of the same seeds, and get the same images.

        Args:
            group (`torch.distributed.ProcessGroup`, *optional*): By default all processes.
        """
        if not torch.distributed.is_initialized():
            raise RuntimeError("A context split needs several processes: launch with `torchrun`.")
        self._split_group = torch.distributed.group.WORLD if group is None else group

    def disable_context_split(self) -> None:
        """Draw every image in this process alone again."""
        self._split_group = None

    @property
    def guidance_scale(self) -> float:
        """Of the running call; a callback that sets `_guidance_scale` changes the next steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are left out; set `_interrupt` in a callback, or from another thread."""
        return self._interrupted_at >= self._started_at

    def _set_interrupt(self, value: bool) -> None:
        self._interrupted_at = time.monotonic() if value else -1.0

    _interrupt = property(lambda self: self.interrupt, _set_interrupt)

    def _check_that_it_draws(self) -> None:
        config = getattr(getattr(self, "transformer", None), "config", None)
        if config is not None and not config.visual_gen:
            raise ValueError("`transformer` cannot draw: it was loaded without `visual_gen=True`.")
        if (few_steps := getattr(config, "few_steps", None)) is not None:
            FewSteps.from_settings(few_steps, "`config.few_steps` of the transformer")

    def check_inputs(
        self,
        prompt: Any = None,
        image: Any = None,
        messages: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: Any = 49,
        sigmas: Any = None,
        max_think_tokens: Any = 1024,
        temperature: Any = 0.3,
        num_images_per_prompt: Any = 1,
        vae_sample_mode: Any = "sample",
        output_type: Any = "pil",
        attention_kwargs: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ("latents",),
        timestep_shift: Any = None,
        images_kwargs: Any = None,
        size_like: Any = "last",
    ) -> None:
        """
        Refuse arguments of a call that cannot work, before anything is computed.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_prompt(prompt, image, messages)
        limit = None if self.interpolate_pos else self.max_latent_size * self.vae_scale_factor
        check_size("height", height, self.vae_scale_factor, limit)
        check_size("width", width, self.vae_scale_factor, limit)
        check_whole_number("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_whole_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        # One step feeds the start token; the last step's token is not kept.
        check_whole_number("max_think_tokens", max_think_tokens, 2)
        check_sigmas(sigmas)
        check_scheduler(self.scheduler, sigmas)
        check_number("temperature", temperature, 1e-6)
        check_choice("vae_sample_mode", vae_sample_mode, VAE_SAMPLE_MODES)
        check_output_type(output_type, self.vae)
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise TypeError(f"`attention_kwargs` must be a dict, got {shown(attention_kwargs)}.")
        check_adapter_scale(self.transformer, attention_kwargs)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_timestep_shift(timestep_shift, self.scheduler)
        check_images_kwargs(images_kwargs)
        check_choice("size_like", size_like, SIZE_RULES)
        self._check_step_cache()

    def encode_conversation(
        self, messages: list[dict[str, Any]], think: bool = False, images_kwargs: dict[str, Any] | None = None
    ) -> list[EncodedSegment]:
        """
        What an image is drawn from: the segments of a conversation, whose images are both latents and seen.

        Args:
            messages (`list[dict]`): Chat messages of one conversation.
            think (`bool`, *optional*, defaults to `False`): Whether a system segment asks for a plan.
            images_kwargs (`dict`, *optional*): As in `__call__`.

        Raises:
            ValueError: if the model cannot see images, or if one is larger than its position tables.
        """
        return self._encode_segments(chat_segments(messages, think, generation_mode="image"), **(images_kwargs or {}))

    def _encode_segments(self, segments: list[Segment], **image_settings: Any) -> list[EncodedSegment]:
        """Segments as tokens, see [`~segments.encode_segments`], if the model can take their images."""
        config = self.transformer.config
        if any(segment.type == "vit_image" for segment in segments) and not config.visual_und:
            raise ValueError("`image`: the transformer cannot see, it was loaded without `visual_und=True`.")
        encoded = self.processor.encode_segments(segments, **image_settings)
        limits = {
            "vae_image": (self.max_latent_size, "vae_size"),
            "vit_image": (config.vit_max_num_patch_per_side, "size"),
        }
        for segment in encoded:
            if segment.grid is None or self.interpolate_pos:
                continue
            limit, setting = limits[segment.segment.type]
            if max(segment.grid) > limit:
                raise ValueError(
                    f"`image` is resized to {max(segment.grid)} tokens a side, but the model's position table ends at "
                    f"{limit}. Lower `{setting}` of the processor."
                )
        return encoded

    @torch.no_grad()
    def encode_image(
        self, pixels: torch.Tensor, generator: torch.Generator | None = None, vae_sample_mode: str = "sample"
    ) -> torch.Tensor:
        """
        Packed latents of one preprocessed image.

        Args:
            pixels (`torch.Tensor` of shape `(3, height, width)`): In [-1, 1].
            generator (`torch.Generator`, *optional*): For the sample of the posterior.
            vae_sample_mode (`str`): `"sample"`, or `"argmax"` for the posterior's mean.

        Returns:
            `torch.Tensor` of shape `(tokens, latent_dim)`, float32.
        """
        return self.encode_images([pixels], [generator], [vae_sample_mode])[0]

    @torch.no_grad()
    def encode_images(
        self,
        pixels: Sequence[torch.Tensor],
        generators: Sequence[torch.Generator | None],
        vae_sample_modes: Sequence[str],
    ) -> list[torch.Tensor]:
        """Packed latents of several images of one size. The arguments are those of `encode_image`, of each."""
        together = encode_posterior(self.vae, torch.stack(list(pixels)), self._execution_device)
        latents = []
        for own, generator, mode in zip(together.parameters.split(1), generators, vae_sample_modes, strict=True):
            latents.append(self._sampled(type(together)(own), generator, mode))
        return latents

    def _sampled(self, posterior: Any, generator: torch.Generator | None, vae_sample_mode: str) -> torch.Tensor:
        """Packed latents of what the VAE made of one image."""
        is_random = VAE_SAMPLE_MODES[vae_sample_mode] == "sample"
        sample = posterior.sample(generator) if is_random else posterior.mode()
        return patchify(scale_latents(sample, self.vae.config)[0], self.latent_patch_size)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int], output_type: str = "pil") -> Any:
        """
        Images of packed latents of one size.

        Args:
            latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): Packed latents.
            grid (`tuple[int, int]`): Rows and columns of tokens.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.

        Raises:
            ValueError: if the VAE gives NaN or infinite pixels.
        """
        cells = unpatchify(latents, grid, self.latent_patch_size)
        images = decode_latents(self.vae, cells, self._execution_device)
        return self.image_processor.postprocess(images, output_type=output_type)

    def prepare_latents(
        self,
        grids: Sequence[tuple[int, int]],
        generators: Sequence[torch.Generator | None],
        latents: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """
        Initial noise, `(batch, tokens, latent_dim)` in float32, zero behind the tokens of the smaller images.

        It is drawn on the generator's device, the CPU by default, in packed order, one image after the other (point
        21): each image of a batch starts from the noise that it has alone.
        """
        if latents is not None:
            return latents.to(device or self._execution_device).clone()
        counts = [rows * columns for rows, columns in grids]
        noise = torch.zeros(len(grids), max(counts), self.latent_dim)
        for index, (count, generator) in enumerate(zip(counts, generators, strict=True)):
            own = torch.device("cpu") if generator is None else generator.device
            shape = (count, self.latent_dim)
            noise[index, :count] = randn_tensor(shape, generator=generator, device=own, dtype=torch.float32)
        return noise.to(device or self._execution_device)

    @torch.no_grad()
    def prepare_contexts(
        self,
        prompts: Sequence[Sequence[EncodedSegment]],
        guidance: Sequence[BagelGuidance],
        think: bool = False,
        max_think_tokens: int = 1024,
        do_sample: bool = False,
        temperature: float = 0.3,
        generators: Sequence[torch.Generator | None] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        temperature_only: bool = False,
        plan_in_no_image: bool = False,
        empty_no_text: bool = False,
    ) -> tuple[list[dict[str, BagelContext]], list[str] | None]:
        """
        The contexts that guidance compares, and the plans, if the model is to think.

        Args:
            prompts (`Sequence[Sequence[EncodedSegment]]`): Each from `encode_conversation`, with the VAE's latents.
            guidance (`Sequence[BagelGuidance]`): Of each prompt.
            think, max_think_tokens, do_sample, temperature: As in `__call__`.
            generators (`Sequence[torch.Generator | None]`, *optional*): Each gives the seed of a sampled plan.
            attention_kwargs (`dict`, *optional*): Passed on to the attention layers; `scale` is that of the adapters.
            temperature_only, plan_in_no_image, empty_no_text: As in `__call__`.
        """
        reader = ContextReader(self.transformer, self.processor, self._execution_device, attention_kwargs)
        full = read_once(reader, prompts)
        plans = None
        if think:
            seeds = [draw_seed(generator) for generator in generators or ()] if do_sample else None
            plans = reader.write(full, max_think_tokens - 1, do_sample, temperature, seeds or None, temperature_only)
            full = reader.read(full, [reader.encode_text(plan) for plan in plans])
        return guidance_contexts(reader, prompts, full, guidance, plan_in_no_image, empty_no_text), plans

    @torch.no_grad()
    @with_defaults
    @with_plain_numbers
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | list[ImageInput] | list[list[ImageInput]] | None = None,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 49,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.0,
        image_guidance_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        cfg_renorm_type: str | None = None,
        cfg_renorm_min: float = 0.0,
        guidance_tolerance: float | None = None,
        think: bool = False,
        max_think_tokens: int = 1024,
        do_sample: bool = False,
        temperature: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        vae_sample_mode: str = "sample",
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the library's signature
        timestep_shift: float | None = None,
        images_kwargs: dict[str, Any] | None = None,
        size_like: str = "last",
        temperature_only: bool = False,
        plan_in_no_image: bool = False,
        empty_no_text: bool = False,
        residual_dtype: str | torch.dtype | None = None,
        preset: str | Preset | None = None,
    ) -> BagelPipelineOutput | tuple:
        r"""
        Function invoked when calling the pipeline for generation.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw, or how to change the image. If not defined, pass `messages`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str`, or a list or list of lists of them, *optional*):
                Images to start from: one for every prompt, a list with several of one prompt, or a list with the list
                of each prompt, which may be empty.
            messages (`list[dict]` or `list[list[dict]]`, *optional*):
                Chat messages with texts and images in any order, instead of `prompt` and `image`.
            height (`int`, *optional*):
                Height of the drawing in pixels, a multiple of 16. By default 1024, or that of the last image given.
            width (`int`, *optional*):
                Width of the drawing in pixels, a multiple of 16. By default 1024, or that of the last image given.
            num_inference_steps (`int`, *optional*, defaults to 49):
                Number of denoising steps. The `num_timesteps=N` of the original code takes N - 1 (point 20).
            sigmas (`list[float]`, *optional*):
                Sigmas of the steps before the scheduler's shift, decreasing, without the final 0.
            guidance_scale (`float`, *optional*, defaults to 4.0):
                Weight of the last text against the context before it. At most 1 turns all guidance off.
            image_guidance_scale (`float`, *optional*):
                Weight of the images against the context without them. At most 1 turns it off. By default 1.0, or 2.0
                with images.
            cfg_interval (`tuple[float, float]`, *optional*):
                Guidance is on for sigmas `low < sigma <= high`. By default (0.4, 1.0), or (0.0, 1.0) with images.
            cfg_renorm_type (`str`, *optional*):
                `"global"`, `"channel"` or `"text_channel"`: what is scaled back to the unguided length. By default
                `"global"`, or `"text_channel"` with images.
            cfg_renorm_min (`float`, *optional*, defaults to 0.0):
                Smallest factor of that scaling.
            guidance_tolerance (`float`, *optional*):
                Hold what a branch of guidance adds, instead of computing it, for as long as this changes the latents by no
                more than about this share, such as 0.005. It changes the images a little. By default every branch is
                computed at every step.
            think (`bool`, *optional*, defaults to `False`):
                Whether the model writes a plan first, returned in `texts`.
            max_think_tokens (`int`, *optional*, defaults to 1024):
                Decoding steps of the plan, the one that feeds the start token included.
            do_sample (`bool`, *optional*, defaults to `False`):
                Whether the plan is sampled instead of greedy. The greedy plans of several prompts are written together,
                sampled ones one by one.
            temperature (`float`, *optional*, defaults to 0.3):
                Temperature of a sampled plan.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Number of images for each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result deterministic; a list holds one for each image.
            latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`, *optional*):
                Packed float32 noise to start from.
            vae_sample_mode (`str`, *optional*, defaults to `"sample"`):
                Whether images given are encoded as a `"sample"` of the posterior, or as its mean (`"argmax"`).
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for packed latents.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`BagelPipelineOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed on to the attention layers of the transformer, except `scale`: what the active LoRA adapters are
                multiplied by during this call.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(self, step, timestep, callback_kwargs)` after each step; what it returns replaces
                the tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Tensors that the callback gets.
            timestep_shift (`float`, *optional*):
                Shift of the sigmas in this call. By default the scheduler's, 3.0 in the original checkpoint.
            images_kwargs (`dict`, *optional*):
                How images given are resized in this call: `vae_size`, `size`, `resize_before_vit` and `max_pixels` of the
                [`BagelImageProcessor`], those that are not to be its own.
            size_like (`str`, *optional*, defaults to `"last"`):
                Whether a drawing has the size of the `"first"` or the `"last"` of several images given.
            temperature_only (`bool`, *optional*, defaults to `False`):
                Whether plans go by the temperature alone, and not by `top_k`, `top_p` and `repetition_penalty` of the
                transformer's generation config.
            plan_in_no_image (`bool`, *optional*, defaults to `False`):
                Whether the context without images, with which guidance compares, holds the plan.
            empty_no_text (`bool`, *optional*, defaults to `False`):
                Whether the one without the last text holds nothing, instead of all that precedes that text.
            residual_dtype (`torch.dtype` or `str`, *optional*):
                Of the hidden states from layer to layer, whose weights and whose own computation keep their type. Published
                benchmarks of BAGEL ran with `"float32"`; by default it is the type of the weights.
            preset (`str` or [`Preset`], *optional*):
                Published settings, or their name in [`PRESETS`], for all that is not passed or is `None`.

        Examples:

        Returns:
            [`BagelPipelineOutput`] or `tuple`: the images, and the plans or `None`.

        Raises:
            ValueError: for arguments that cannot work, and if the latents become infinite or NaN.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self._check_that_it_draws()
        self.check_inputs(
            prompt,
            image,
            messages,
            height,
            width,
            num_inference_steps,
            sigmas,
            max_think_tokens,
            temperature,
            num_images_per_prompt,
            vae_sample_mode,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            timestep_shift,
            images_kwargs,
            size_like,
        )
        told = with_residual_dtype(attention_kwargs, residual_dtype)
        flags = {"think": think, "do_sample": do_sample, "return_dict": return_dict}
        flags |= {"temperature_only": temperature_only, "plan_in_no_image": plan_in_no_image}
        for name, flag in (flags | {"empty_no_text": empty_no_text}).items():
            check_flag(name, flag)
        check_guidance(guidance_scale, image_guidance_scale, cfg_interval, cfg_renorm_type, cfg_renorm_min)
        check_guidance_tolerance(guidance_tolerance, has_step_cache=self._caching is not None)
        conversations = as_conversations(prompt, image, messages)
        generators = as_generators(generator, len(conversations) * num_images_per_prompt)
        if self._split_group is not None and None in generators:
            raise ValueError(
                "A context split needs a `generator`, of the same seed in every process, or each would draw another image."
            )
        prompts = [self.encode_conversation(conversation, think, images_kwargs) for conversation in conversations]
        sizes = [self._grid(segments, height, width, size_like) for segments in prompts]
        grids = [grid for grid in sizes for _ in range(num_images_per_prompt)]
        check_latents(latents, grids, self.latent_dim)
        for segments in prompts:
            self._check_context(segments, max_think_tokens if think else 0)
        call = self._new_call(guidance_scale, attention_kwargs, timestep_shift)

        try:
            # 2. Prepare the contexts, and then the noise: the generators are used in this order
            own_generators = generators[::num_images_per_prompt]
            prompts = self._encode_images(share_segments(prompts), own_generators, vae_sample_mode)
            guidance = [
                (EDITING if any(segment.grid for segment in segments) else TEXT_TO_IMAGE).with_changes(
                    text_scale=guidance_scale,
                    image_scale=image_guidance_scale,
                    interval=cfg_interval,
                    renorm_type=cfg_renorm_type,
                    renorm_min=cfg_renorm_min,
                    tolerance=guidance_tolerance,
                )
                for segments in prompts
            ]
            contexts, plans = self.prepare_contexts(
                prompts,
                guidance,
                think,
                max_think_tokens,
                do_sample,
                temperature,
                own_generators,
                told,
                temperature_only,
                plan_in_no_image,
                empty_no_text,
            )
            denoiser = Denoiser(
                self.transformer,
                [own for own in contexts for _ in range(num_images_per_prompt)],
                grids,
                [own for own in guidance for _ in range(num_images_per_prompt)],
                self._caching,
                self._split_group,
                told,
            )
            del contexts, prompts
            latents = self.prepare_latents(grids, generators, latents)

            # 3. Prepare timesteps: the scheduler shifts them once
            loop = self._prepare_loop(call, denoiser, latents, num_inference_steps, sigmas)

            # 4. Denoising loop: on an accelerator the host reads nothing back
            with self.progress_bar(total=num_inference_steps if sigmas is None else len(sigmas)) as progress_bar:
                for i, t in loop:
                    if callback_on_step_end is not None:
                        callback_kwargs = {}
                        for name in callback_on_step_end_tensor_inputs:
                            callback_kwargs[name] = getattr(loop, name)
                        callback_outputs = callback_on_step_end(call, i, t, callback_kwargs)
                        loop.latents = check_callback_outputs(callback_outputs).pop("latents", loop.latents)
                    if loop.is_whole_step(i):
                        progress_bar.update()
            latents = loop.latents

            # 5. Decode
            images = self._decode(latents, grids, output_type)
        finally:
            self.maybe_free_model_hooks()
        # What the last call used can still be read, as of other pipelines; no call reads it.
        self._guidance_scale, self._num_timesteps = call.guidance_scale, call.num_timesteps
        texts = None if plans is None else [plan for plan in plans for _ in range(num_images_per_prompt)]
        if not return_dict:
            return (images, texts)
        return BagelPipelineOutput(images=images, texts=texts)

    def _new_call(
        self, guidance_scale: float, attention_kwargs: dict[str, Any] | None, timestep_shift: float | None = None
    ) -> "BagelPipeline":
        """A copy of the pipeline that holds what belongs to one call."""
        call = copy.copy(self)
        call._started_at = time.monotonic()
        call.scheduler = copy.deepcopy(self.scheduler)
        if timestep_shift is not None:
            call.scheduler.set_shift(timestep_shift)
        call._guidance_scale = guidance_scale
        call._attention_kwargs = attention_kwargs
        return call

    def _prepare_loop(
        self,
        call: "BagelPipeline",
        denoiser: Denoiser,
        latents: torch.Tensor,
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
    ) -> DenoisingLoop:
        """The steps of a call, which end when it is interrupted, or this pipeline is."""
        timesteps, levels = call._prepare_timesteps(num_inference_steps, sigmas, latents.device)
        return DenoisingLoop(
            call,
            denoiser,
            latents,
            timesteps,
            levels,
            lambda: call.interrupt or self._interrupted_at >= call._started_at,
        )

    def _prepare_timesteps(
        self, num_inference_steps: int, sigmas: Sequence[float] | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps of the scheduler, and the sigma in [0, 1] of each, on the CPU; exact where it knows them."""
        levels = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1] if sigmas is None else torch.as_tensor(sigmas)
        if takes_sigmas(self.scheduler):
            self.scheduler.set_timesteps(sigmas=levels.float().numpy(), device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            return timesteps, self.scheduler.sigmas[: len(timesteps)].float().cpu()
        return timesteps, timesteps.float().cpu() / self.scheduler.config.num_train_timesteps

    def _encode_images(
        self,
        prompts: Sequence[Sequence[EncodedSegment]],
        generators: Sequence[torch.Generator | None],
        vae_sample_mode: str,
    ) -> list[list[EncodedSegment]]:
        """
        The same prompts with the latents of their images. Of segments that are one object, the VAE encodes the image once,
        and they stay one object unless each is a sample of its own.
        """
        is_random, device = VAE_SAMPLE_MODES[vae_sample_mode] == "sample", self._execution_device
        posteriors: dict[int, Any] = {}
        found: dict[int, EncodedSegment] = {}

        def encoded(segment: EncodedSegment, generator: torch.Generator | None) -> EncodedSegment:
            if segment.segment.type != "vae_image":
                return segment
            key = id(segment)
            if key not in posteriors:
                posteriors[key] = encode_posterior(self.vae, segment.pixels, device)
            if is_random or key not in found:
                found[key] = replace(segment, latents=self._sampled(posteriors[key], generator, vae_sample_mode))
            return found[key]

        return [
            [encoded(segment, generator) for segment in segments]
            for segments, generator in zip(prompts, generators, strict=True)
        ]

    def _decode(self, latents: torch.Tensor, grids: list[tuple[int, int]], output_type: str) -> Any:
        if len(set(grids)) == 1:
            return latents if output_type == "latent" else self.decode_latents(latents, grids[0], output_type)
        images = []
        for grid, own in zip(grids, latents, strict=True):
            own = own[: grid[0] * grid[1]]
            images.append(own if output_type == "latent" else self.decode_latents(own[None], grid, output_type)[0])
        return images

    def _grid(
        self, segments: Sequence[EncodedSegment], height: int | None, width: int | None, size_like: str
    ) -> tuple[int, int]:
        """Rows and columns of tokens of a drawing: as asked for, else like an image, else the default size."""
        rows = columns = self.default_sample_size // self.vae_scale_factor
        if grids := [segment.grid for segment in segments if segment.grid and segment.segment.type == "vae_image"]:
            rows, columns = grids[SIZE_RULES[size_like]]
        stride = self.vae_scale_factor
        return height // stride if height else rows, width // stride if width else columns

    def _check_context(self, segments: list[EncodedSegment], max_think_tokens: int) -> None:
        limit = self.transformer.config.text_config.max_position_embeddings
        # The drawing takes one position.
        needed = sum(segment.num_positions for segment in segments) + 1
        if needed + max_think_tokens > limit:
            plan = f" and `max_think_tokens` of {max_think_tokens}" if max_think_tokens else ""
            raise ValueError(
                f"The prompt of {needed} rope positions{plan} exceeds the {limit} that the model knows "
                "(`max_position_embeddings`). Shorten it."
            )
