# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Draw and edit with BAGEL: contexts, guidance, flow matching, decoding."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.z_image.pipeline_z_image import retrieve_timesteps
from diffusers.utils import is_torch_xla_available, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import BatchFeature, DynamicCache
from transformers.utils import cached_file

from transformers_bagel import (
    BagelForConditionalGeneration,
    BagelProcessor,
    GrowingCache,
    PrefixBuffer,
    PrefixCache,
    PrefixLane,
    SplitPrefixCache,
    fork_cache,
)
from transformers_bagel.image_processing_bagel import patchify
from transformers_bagel.sequence import rope_positions
from transformers_bagel.training.latents import VAE_SAMPLE_MODES, scale_latents

from .batches import (
    FORWARD_COST,
    MAX_PLAN_TOKENS,
    MAX_PREFILL_TOKENS,
    MAX_STEP_TOKENS,
    MAX_STEP_TOKENS_CPU,
    batches_of,
    join_caches,
    pad_rows,
    runs_of,
    split_cache,
)
from .caching import TaylorSeerConfig, TaylorSeerState
from .guidance import EDITING, TEXT_TO_IMAGE, BagelGuidance
from .inputs import (
    OUTPUT_TYPES,
    as_conversations,
    as_generators,
    check_callback,
    check_choice,
    check_guidance,
    check_number,
    check_prompt,
    check_sigmas,
    check_size,
    check_whole_number,
    parts_of,
)
from .loading import VAE_FILE, check_saved_vae, load_published_vae
from .lora import BagelLoraLoaderMixin, check_no_adapters, scales_lora
from .memory import cast_layers, pipeline_quantization, transformer_quantization
from .pipeline_output import BagelPipelineOutput


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

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


@dataclass
class BagelContext:
    """What one image is drawn from: the first `length` tokens of a cache, and the next rope position."""

    cache: DynamicCache | None
    length: int
    next_position: int


@dataclass
class _Row:
    """One image in the making: its size in tokens, its guidance, and the lane of each of its contexts."""

    grid: tuple[int, int]
    guidance: BagelGuidance
    lanes: dict[str, int]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass
class _Lanes:
    """All contexts of a call, as lanes of one denoising batch; the TaylorSeer states live and die with it."""

    cache: PrefixCache
    positions: torch.Tensor
    states: list[TaylorSeerState] | None
    selected: dict[tuple[int, ...], PrefixCache] = field(default_factory=dict)

    def select(self, lanes: list[int]) -> PrefixCache:
        """The cache of some of the lanes: the same object at each step, which keeps what the steps share."""
        key = tuple(lanes)
        if key not in self.selected:
            self.selected[key] = self.cache.select(lanes)
        return self.selected[key]


class BagelPipeline(DiffusionPipeline, BagelLoraLoaderMixin):
    r"""
    Pipeline for text-to-image generation and image editing with BAGEL.

    Args:
        transformer ([`BagelForConditionalGeneration`]):
            The model. The pipeline uses it through `forward` and `generate` only.
        vae ([`AutoencoderKL`]): FLUX's VAE.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): With `shift=3.0` as published.
        processor ([`BagelProcessor`]): Reads prompts, messages and images.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

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
        if config is not None and not config.visual_gen:
            raise ValueError("`transformer` was loaded without its drawing half. Load it with `visual_gen=True`.")
        self.latent_patch_size = config.latent_patch_size if config is not None else 2
        self.vae_scale_factor = config.latent_stride if config is not None else 16
        self.latent_dim = config.latent_dim if config is not None else 64
        self.max_latent_size = config.max_latent_size if config is not None else 64
        self.interpolate_pos = config.interpolate_pos if config is not None else False
        self.default_sample_size = min(1024, self.max_latent_size * self.vae_scale_factor)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, resample="bicubic")
        self._taylorseer: TaylorSeerConfig | None = None
        self._split_group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "BagelPipeline":
        r"""
        Load a pipeline from a Hub repository or a directory, in diffusers' layout or in the published one.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or directory.
            kwargs: As in [`DiffusionPipeline.from_pretrained`]: `dtype`, `device_map`, `revision`, components by name.
                `quantization_config` may be a [`PipelineQuantizationConfig`] or that of the transformer.

        Raises:
            OSError: if there is no checkpoint.
            ValueError: if `quantization_config` is something else, or does not fit.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = pipeline_quantization(kwargs["quantization_config"])
        hub_kwargs: dict[str, Any] = {
            key: kwargs[key] for key in ("cache_dir", "token", "revision", "local_files_only") if key in kwargs
        }
        if os.path.isdir(pretrained_model_name_or_path) and not os.listdir(pretrained_model_name_or_path):
            raise OSError(f"The directory '{pretrained_model_name_or_path}' is empty: it holds no checkpoint.")
        missing = {"_raise_exceptions_for_missing_entries": False}
        if cached_file(pretrained_model_name_or_path, "model_index.json", **hub_kwargs, **missing):
            if "vae" not in kwargs:
                check_saved_vae(os.path.join(pretrained_model_name_or_path, "vae"))
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        has_vae = cached_file(pretrained_model_name_or_path, VAE_FILE, **hub_kwargs, **missing)
        if not has_vae and "vae" not in kwargs:
            raise OSError(
                f"'{pretrained_model_name_or_path}' holds neither model_index.json (diffusers' layout) nor {VAE_FILE} "
                "(the published layout): it is no BAGEL pipeline. Pass the folder of a checkpoint."
            )
        return cls._from_published(pretrained_model_name_or_path, hub_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """See [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if the transformer has adapters, before anything is written.
        """
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
        """Like the parent's. Whoever calls this class has no use for the code by which a repository leads here."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    @classmethod
    def _from_published(cls, path: str | os.PathLike, hub_kwargs: dict[str, Any], **kwargs: Any) -> "BagelPipeline":
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        components = {
            name: kwargs.pop(name) for name in ("transformer", "vae", "scheduler", "processor") if name in kwargs
        }
        device_map = kwargs.pop("device_map", None)
        quantization = kwargs.pop("quantization_config", None)
        kwargs = {key: value for key, value in kwargs.items() if key not in hub_kwargs}
        if kwargs:
            raise TypeError(
                f"{', '.join(sorted(kwargs))}: unknown for the published layout. Load the components with their own "
                "`from_pretrained` and pass them by name."
            )
        if "transformer" not in components:
            components["transformer"] = BagelForConditionalGeneration.from_pretrained(
                path,
                dtype=dtypes.get("transformer", dtypes.get("default")) or torch.float32,
                device_map=device_map,
                quantization_config=None if quantization is None else transformer_quantization(quantization),
                **hub_kwargs,
            )
        if "vae" not in components:
            vae_dtype = dtypes.get("vae", dtypes.get("default")) or torch.float32
            components["vae"] = load_published_vae(path, vae_dtype, **hub_kwargs)
            if device_map is not None:
                components["vae"] = components["vae"].to(components["transformer"].device)
        if "scheduler" not in components:
            # Published shift (point 19).
            components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        if "processor" not in components:
            components["processor"] = BagelProcessor.from_pretrained(path, **hub_kwargs)
        pipe = cls(**components)
        if quantization is not None:
            pipe.quantization_config = quantization
        return pipe

    def enable_taylorseer(self, interval: int = 3, warmup_steps: int = 5, max_order: int = 6) -> None:
        """
        Predict the model's output on most steps instead of computing it, which changes the images a little.

        Args:
            interval (`int`, defaults to 3): After the warm-up, one step in `interval` is computed.
            warmup_steps (`int`, defaults to 5): First steps, which are all computed.
            max_order (`int`, defaults to 6): Highest order of the Taylor expansion.
        """
        self._taylorseer = TaylorSeerConfig(interval, warmup_steps, max_order)

    def disable_taylorseer(self) -> None:
        """Compute every step again."""
        self._taylorseer = None

    def enable_context_split(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
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
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        image: Any,
        messages: list | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        sigmas: list[float] | None,
        guidance_scale: float,
        image_guidance_scale: float | None,
        cfg_interval: tuple[float, float] | None,
        cfg_renorm_type: str | None,
        cfg_renorm_min: float,
        max_think_tokens: int,
        temperature: float,
        num_images_per_prompt: int,
        vae_sample_mode: str,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` or `TypeError` for arguments that cannot work, before anything is computed."""
        check_prompt(prompt, image, messages)
        limit = None if self.interpolate_pos else self.max_latent_size * self.vae_scale_factor
        check_size("height", height, self.vae_scale_factor, limit)
        check_size("width", width, self.vae_scale_factor, limit)
        check_whole_number("num_inference_steps", num_inference_steps, 1)
        check_whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        # One step feeds the start token; the last step's token is not kept.
        check_whole_number("max_think_tokens", max_think_tokens, 2)
        check_sigmas(sigmas)
        check_guidance(guidance_scale, image_guidance_scale, cfg_interval, cfg_renorm_type, cfg_renorm_min)
        check_number("temperature", temperature, 1e-6)
        check_choice("vae_sample_mode", vae_sample_mode, VAE_SAMPLE_MODES)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise TypeError(f"`attention_kwargs` must be a dict, got {attention_kwargs!r}.")
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def preprocess(self, conversation: list[dict[str, Any]], think: bool) -> BatchFeature:
        """Model inputs of one conversation as a condition for drawing, see [`BagelProcessor`]."""
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            think=think,
            generation_mode="image",
        )
        if "pixel_values" in inputs and not self.transformer.config.visual_und:
            raise ValueError(
                "`image`: the transformer was loaded without its seeing half. Load it with `visual_und=True`."
            )
        if "vae_pixel_values" in inputs and not self.interpolate_pos:
            latents = max(max(pixels.shape[1:]) for pixels in inputs["vae_pixel_values"]) // self.vae_scale_factor
            patches = int(inputs["image_grid_hw"].max())
            side = self.transformer.config.vit_max_num_patch_per_side
            for seen, limit, setting in ((latents, self.max_latent_size, "vae_size"), (patches, side, "size")):
                if seen > limit:
                    raise ValueError(
                        f"`image` is resized to {seen} tokens a side, but the model's position table ends at {limit}. "
                        f"Lower `{setting}` of the processor."
                    )
        return inputs

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
        posterior = self.vae.encode(pixels.unsqueeze(0).to(self._execution_device, self.vae.dtype)).latent_dist
        latents = posterior.sample(generator) if VAE_SAMPLE_MODES[vae_sample_mode] == "sample" else posterior.mode()
        return patchify(scale_latents(latents, self.vae.config)[0].float(), self.latent_patch_size)

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int], output_type: str) -> Any:
        """
        Images of packed latents of one size.

        Args:
            latents (`torch.Tensor` of shape `(batch, tokens, latent_dim)`): Packed latents.
            grid (`tuple[int, int]`): Rows and columns of tokens.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.
        """
        patch = self.latent_patch_size
        cells = latents.unflatten(1, grid).unflatten(-1, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4)
        cells = cells.flatten(4, 5).flatten(2, 3)
        cells = cells / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self.vae.decode(cells.to(self._execution_device, self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(images.float(), output_type=output_type)

    def prefill(self, inputs: list[BatchFeature], latents: list[list[torch.Tensor]]) -> list[BagelContext]:
        """
        Contexts of conversations: all texts and images of one in one forward, which short texts share.

        A text joins those shorter than it while the padding costs less than a forward of its own would. Conversations
        with images run one by one, since their many tokens gain nothing: four of 611 tokens together took 0.95 of
        the time of one by one, four of 2424 tokens 1.05, on a CPU at the middle width of the benchmarks.

        Args:
            inputs (`list[BatchFeature]`): Model inputs of each conversation, which may be empty.
            latents (`list[list[torch.Tensor]]`): Latents of the images of each, `(tokens, latent_dim)` an image.

        Returns:
            `list[BagelContext]`: One for each conversation.
        """
        contexts = [BagelContext(None, 0, 0)] * len(inputs)
        lengths = [item["input_ids"].shape[1] for item in inputs]
        texts = [index for index, item in enumerate(inputs) if lengths[index] and "pixel_values" not in item]
        batches = [[index] for index, item in enumerate(inputs) if "pixel_values" in item]
        for batch in batches_of([lengths[index] for index in texts], MAX_PREFILL_TOKENS, FORWARD_COST):
            batches.append([texts[place] for place in batch])
        for batch in batches:
            rows = [inputs[index] for index in batch]
            counts = [lengths[index] for index in batch]
            found = self._prefill_batch(rows, [item for index in batch for item in latents[index]], counts)
            for index, context in zip(batch, found, strict=True):
                contexts[index] = context
        return contexts

    def _prefill_batch(
        self, rows: list[BatchFeature], latents: list[torch.Tensor], lengths: list[int]
    ) -> list[BagelContext]:
        """One forward of several texts, or of one conversation."""
        # Padding stands behind the texts, where causality hides it: no mask, and the positions are those of one row.
        inputs = rows[0]
        if len(rows) > 1:
            names = ("input_ids", "mm_token_type_ids")
            inputs = BatchFeature({name: pad_rows([row[name] for row in rows], 0) for name in names})
        position_ids = rope_positions(inputs["mm_token_type_ids"])
        arguments = self._model_inputs(inputs)
        if latents:
            stride = self.vae_scale_factor
            grids = [(pixels.shape[1] // stride, pixels.shape[2] // stride) for pixels in inputs["vae_pixel_values"]]
            arguments |= {
                "latents": torch.cat(latents).to(self._execution_device),
                "latent_grid_hw": torch.tensor(grids),
                "timesteps": torch.zeros(len(latents), device=self._execution_device),
            }
        cache = GrowingCache(self.transformer.config)
        self.transformer(
            **arguments,
            position_ids=position_ids.to(self._execution_device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._transformer_kwargs,
        )
        return [
            BagelContext(own, length, int(positions[length - 1]) + 1)
            for own, length, positions in zip(
                split_cache(cache, [0] * len(rows), lengths), lengths, position_ids, strict=True
            )
        ]

    def think(
        self,
        inputs: list[BatchFeature],
        contexts: list[BagelContext],
        max_think_tokens: int,
        do_sample: bool,
        temperature: float,
        generators: list[torch.Generator | None],
    ) -> list[tuple[str, BagelContext]]:
        """
        Let the model write a plan for each context, and add it.

        Greedy plans are written together. Sampled ones are written one by one, since `generate` draws for all its
        rows from one random state, and each is to be what its own generator gives it alone.

        Args:
            inputs (`list[BatchFeature]`): What each context was made from.
            contexts (`list[BagelContext]`): The contexts, which stay as they are.
            max_think_tokens (`int`): Decoding steps, the one that feeds the start token included.
            do_sample, temperature: Of the text.
            generators (`list[torch.Generator | None]`): One for each context; its seed rules a sampled plan.

        Returns:
            `list[tuple[str, BagelContext]]`: Each plan, and the context with it.
        """
        planned: dict[int, tuple[str, BagelContext]] = {}
        batches = [[index] for index in range(len(contexts))]
        if not do_sample:
            batches = batches_of([context.length + max_think_tokens for context in contexts], MAX_PLAN_TOKENS)
        sampling = {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
        for batch in batches:
            own = [contexts[index] for index in batch]
            cache = join_caches([context.cache for context in own])
            with _seeded(generators[batch[0]] if do_sample else None, self._execution_device):
                plans = self._write_plans([inputs[index] for index in batch], cache, max_think_tokens, **sampling)
            planned |= zip(batch, zip(plans, self._add_plans(plans, own, cache), strict=True), strict=True)
        return [planned[index] for index in range(len(contexts))]

    def _write_plans(
        self, inputs: list[BatchFeature], cache: DynamicCache, max_think_tokens: int, **sampling: Any
    ) -> list[str]:
        """Continue the rows of a cache, which stays as it is, by what follows a start token."""
        tokenizer = self.processor.tokenizer
        start, end = "<|im_start|>", "<|im_end|>"
        start_ids = torch.tensor([[tokenizer.convert_tokens_to_ids(start)]])
        rows = [torch.cat([row["input_ids"], start_ids], dim=1) for row in inputs]
        prompt = pad_rows(rows, tokenizer.pad_token_id, side="left")
        types = pad_rows([torch.nn.functional.pad(row["mm_token_type_ids"], (0, 1)) for row in inputs], 0, side="left")
        mask = pad_rows([torch.ones_like(row) for row in rows], 0, side="left")
        sequences = self.transformer.generate(
            input_ids=prompt.to(self._execution_device),
            mm_token_type_ids=types.to(self._execution_device),
            attention_mask=mask.to(self._execution_device),
            past_key_values=fork_cache(cache),
            max_new_tokens=max_think_tokens - 1,
            **sampling,
        )
        stops = self.transformer.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops])
        plans = [tokenizer.decode(_until_stop(tokens, stops)) for tokens in sequences[:, prompt.shape[1] :].tolist()]
        return [plan.split(end)[0].split(start)[0] for plan in plans]

    def _add_plans(self, plans: list[str], contexts: list[BagelContext], cache: DynamicCache) -> list[BagelContext]:
        """Contexts with their plans, after one forward that extends the joined cache of the contexts."""
        tokenizer = self.processor.tokenizer
        rows = [torch.tensor([tokenizer(f"<|im_start|>{plan}<|im_end|>")["input_ids"]]) for plan in plans]
        # Behind a plan, causality hides the padding; before a context, a mask does.
        ids = pad_rows(rows, tokenizer.pad_token_id)
        longest = cache.get_seq_length()
        padding = [longest - context.length for context in contexts]
        mask = None
        if any(padding):
            mask = (torch.arange(longest + ids.shape[1]) >= torch.tensor(padding)[:, None]).long()
            mask = mask.to(self._execution_device)
        position_ids = torch.tensor([[context.next_position] for context in contexts]) + torch.arange(ids.shape[1])
        self.transformer(
            input_ids=ids.to(self._execution_device),
            attention_mask=mask,
            position_ids=position_ids.to(self._execution_device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._transformer_kwargs,
        )
        counts = [row.shape[1] for row in rows]
        lengths = [context.length + count for context, count in zip(contexts, counts, strict=True)]
        return [
            BagelContext(own, length, context.next_position + count)
            for own, length, context, count in zip(
                split_cache(cache, padding, lengths), lengths, contexts, counts, strict=True
            )
        ]

    def prepare_batch(
        self,
        conversations: list[list[dict[str, Any]]],
        inputs: list[BatchFeature],
        latents: list[list[torch.Tensor]],
        guidance: list[BagelGuidance],
        think: bool,
        max_think_tokens: int,
        do_sample: bool,
        temperature: float,
        generators: list[torch.Generator | None],
    ) -> list[tuple[dict[str, BagelContext], str | None]]:
        """
        Contexts and plans of several conversations, see `prefill`, `think` and `prepare_contexts`.

        All arguments that are lists have one item for each conversation, and so has what is returned.
        """
        prompts = self.prefill(inputs, latents)
        planned: list[tuple[str | None, BagelContext]] = [(None, prompt) for prompt in prompts]
        if think:
            planned = list(self.think(inputs, prompts, max_think_tokens, do_sample, temperature, generators))
        compared = [
            index
            for index, how in enumerate(guidance)
            if how.text_scale > 1 and how.image_scale > 1 and (latents[index] or think)
        ]
        imageless = [self._inputs_without_images(conversations[index], think) for index in compared]
        no_image = dict(zip(compared, self.prefill(imageless, [[]] * len(compared)), strict=True))
        return [
            self.prepare_contexts(conversation, how, prompts[index], *planned[index], no_image.get(index))
            for index, (conversation, how) in enumerate(zip(conversations, guidance, strict=True))
        ]

    def prepare_contexts(
        self,
        conversation: list[dict[str, Any]],
        guidance: BagelGuidance,
        prompt: BagelContext,
        plan: str | None,
        full: BagelContext,
        no_image: BagelContext | None,
    ) -> tuple[dict[str, BagelContext], str | None]:
        """
        The contexts that guidance compares, and the plan if there is one (published behaviour, points 14-16).

        `full` is everything; `no_text` the same before the last text, unless an image follows it; `no_image` all
        texts but the plan. A context that equals `full` is the same object, and its velocity is not computed twice.

        Args:
            conversation (`list[dict]`): What is drawn.
            guidance (`BagelGuidance`): By which a `text_scale` of at most 1 leaves `full` alone.
            prompt (`BagelContext`): The context before the plan.
            plan (`str`, *optional*): The plan.
            full (`BagelContext`): The context with the plan; without one, `prompt` itself.
            no_image (`BagelContext`, *optional*): By default `full`.
        """
        contexts = {"full": full}
        if guidance.text_scale > 1:
            tail = self._tokens_of_last_text(conversation)
            contexts["no_text"] = (
                full
                if tail == 0 and full is prompt
                else BagelContext(full.cache, prompt.length - tail, prompt.next_position - tail)
            )
            contexts["no_image"] = full if no_image is None else no_image
        return contexts, plan

    def _tokens_of_last_text(self, conversation: list[dict[str, Any]]) -> int:
        """Tokens of the text that ends a conversation; 0 if an image ends it."""
        last = parts_of(conversation)[-1]
        if last["type"] != "text":
            return 0
        return len(self.processor.tokenizer(f"<|im_start|>{last['text']}<|im_end|>")["input_ids"])

    def _inputs_without_images(self, conversation: list[dict[str, Any]], think: bool) -> BatchFeature:
        texts = [part for part in parts_of(conversation) if part["type"] == "text"]
        if not texts and not think:
            empty = torch.zeros(1, 0, dtype=torch.long)
            return BatchFeature({"input_ids": empty, "mm_token_type_ids": empty})
        return self.preprocess([{"role": "user", "content": texts}], think)

    def _model_inputs(self, inputs: BatchFeature) -> dict[str, Any]:
        names = ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_hw")
        return {name: inputs[name].to(self._execution_device) for name in names if name in inputs}

    def prepare_latents(
        self,
        grids: list[tuple[int, int]],
        generators: list[torch.Generator | None],
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Initial noise, `(batch, tokens, latent_dim)` in float32, zero behind the tokens of the smaller images.

        It is drawn on the generator's device, the CPU by default, in packed order, one image after the other (point
        21): a batch starts from the noise of its single runs.
        """
        if latents is not None:
            return latents.to(self._execution_device).clone()
        counts = [rows * columns for rows, columns in grids]
        noise = torch.zeros(len(grids), max(counts), self.latent_dim)
        for index, (count, generator) in enumerate(zip(counts, generators, strict=True)):
            noise[index, :count] = randn_tensor((count, self.latent_dim), generator=generator, dtype=torch.float32)
        return noise.to(self._execution_device)

    def _check_latents(self, latents: torch.Tensor | None, grids: list[tuple[int, int]]) -> None:
        if latents is None:
            return
        shape = (len(grids), max(rows * columns for rows, columns in grids), self.latent_dim)
        if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
            given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise ValueError(
                f"`latents` must be packed noise of shape {shape} (batch, tokens, latent_dim), got {given}."
            )
        if latents.dtype != torch.float32:
            raise ValueError(f"`latents` must be float32, got {latents.dtype}. Pass `latents.float()`.")

    def _check_generators(self, generators: list[torch.Generator | None]) -> None:
        if self._split_group is not None and None in generators:
            raise ValueError(
                "A context split needs a `generator`, of the same seed in every process, or each would draw another image."
            )

    def _prepare_lanes(
        self, contexts: list[dict[str, BagelContext]], grids: list[tuple[int, int]], guidance: list[BagelGuidance]
    ) -> tuple[_Lanes, list[_Row]]:
        """Lay the prefixes of all contexts into buffers, each once, and give every image its lanes in them."""
        lanes: list[PrefixLane] = []
        lengths: list[int] = []
        positions: list[int] = []
        rows: list[_Row] = []
        buffers: dict[int, PrefixBuffer] = {}

        def add(lane: PrefixLane, context: BagelContext) -> int:
            lanes.append(lane)
            positions.append(context.next_position)
            return len(lanes) - 1

        def buffer_of(context: BagelContext, room: int, common: int | None = None) -> PrefixBuffer | None:
            if context.cache is None:
                return None
            key = id(context.cache)
            if key not in buffers:
                buffers[key] = PrefixBuffer.from_cache(context.cache, room, common=common)
            return buffers[key]

        for sample, grid, how in zip(contexts, grids, guidance, strict=True):
            room = grid[0] * grid[1] + 2
            full, no_text, no_image = sample["full"], sample.get("no_text"), sample.get("no_image")
            buffer = buffer_of(full, room, no_text.length if no_text is not None else None)
            row = {"full": add(PrefixLane(buffer), full)}
            if no_text is not None and no_image is not None:
                row["no_text"] = row["full"]
                if no_text is not full:
                    # The tokens that only the full context has stand first in the buffer.
                    row["no_text"] = add(PrefixLane(buffer, full.length - no_text.length), no_text)
                row["no_image"] = row["full"]
                if no_image is not full:
                    row["no_image"] = add(PrefixLane(buffer_of(no_image, room)), no_image)
            rows.append(_Row(grid, how, row))
            lengths += [rows[-1].num_tokens] * (len(lanes) - len(lengths))
        states = None if self._taylorseer is None else [TaylorSeerState(self._taylorseer) for _ in lanes]
        group = self._split_group
        cache = PrefixCache(lanes) if group is None else SplitPrefixCache(lanes, lengths, group)
        return _Lanes(cache, torch.tensor(positions), states), rows

    def _predict_velocity(
        self,
        latents: torch.Tensor,
        level: torch.Tensor,
        device_level: torch.Tensor,
        rows: list[_Row],
        lanes: _Lanes,
    ) -> torch.Tensor:
        """Guided velocity of all images, `(batch, tokens, latent_dim)` in float32, at a noise level.

        Guidance reads the level on the CPU, the model on its device.
        """
        branches: list[tuple[BagelGuidance, dict[str, int]]] = []
        owner: dict[int, int] = {}
        for index, row in enumerate(rows):
            guidance = row.guidance.with_changes(text_scale=self._guidance_scale)
            needed = {name: row.lanes[name] for name in guidance.branches(level) if name in row.lanes}
            branches.append((guidance, needed))
            owner |= dict.fromkeys(needed.values(), index)
        active = sorted(owner)
        if lanes.states is None:
            computed, skipped = active, []
        else:
            due = {lane: lanes.states[lane].advance() for lane in active}
            computed = [lane for lane in active if due[lane]]
            skipped = [lane for lane in active if not due[lane]]

        velocities: dict[int, torch.Tensor] = {}
        limit = MAX_STEP_TOKENS_CPU if latents.device.type == "cpu" else MAX_STEP_TOKENS
        for run in runs_of([rows[owner[lane]].num_tokens for lane in computed], limit):
            batch = [computed[place] for place in run]
            velocities |= self._compute_velocities(latents, device_level, rows, lanes, batch, owner)
        if skipped and lanes.states is not None:
            features = [lanes.states[lane].predict() for lane in skipped]
            outputs = self.transformer(latent_hidden_states=torch.cat(features))
            velocities |= dict(zip(skipped, outputs.velocity.split([len(item) for item in features]), strict=True))

        velocity = torch.zeros_like(latents)
        for index, (row, (guidance, needed)) in enumerate(zip(rows, branches, strict=True)):
            velocity[index, : row.num_tokens] = guidance({name: velocities[lane] for name, lane in needed.items()})
        return velocity

    def _compute_velocities(
        self,
        latents: torch.Tensor,
        level: torch.Tensor,
        rows: list[_Row],
        lanes: _Lanes,
        computed: list[int],
        owner: dict[int, int],
    ) -> dict[int, torch.Tensor]:
        """One forward: the velocity of each lane, `(tokens, latent_dim)`."""
        images = [owner[lane] for lane in computed]
        counts = [rows[index].num_tokens for index in images]
        outputs = self.transformer(
            latents=torch.cat([latents[index, :count] for index, count in zip(images, counts, strict=True)]),
            latent_grid_hw=torch.tensor([rows[index].grid for index in images]),
            timesteps=level.expand(len(images)),
            position_ids=lanes.positions[computed],
            past_key_values=lanes.select(computed),
            **self._transformer_kwargs,
        )
        if lanes.states is not None:
            for lane, features in zip(computed, outputs.latent_hidden_states.split(counts), strict=True):
                lanes.states[lane].update(features)
        return dict(zip(computed, outputs.velocity.split(counts), strict=True))

    @property
    def _transformer_kwargs(self) -> dict[str, Any]:
        # The scale of LoRA is not the attention's: `scales_lora` applies it.
        return {key: value for key, value in (self._attention_kwargs or {}).items() if key != "scale"}

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @scales_lora
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
                Number of denoising steps. The published `num_timesteps=N` takes N - 1 of them.
            sigmas (`list[float]`, *optional*):
                Noise levels of the steps before the scheduler's shift, decreasing, without the final 0.
            guidance_scale (`float`, *optional*, defaults to 4.0):
                Weight of the last text against the context before it. At most 1 turns all guidance off.
            image_guidance_scale (`float`, *optional*):
                Weight of the images against the context without them. At most 1 turns it off. By default 1.0, or 2.0
                with images.
            cfg_interval (`tuple[float, float]`, *optional*):
                Guidance is on for noise levels `low < t <= high`. By default (0.4, 1.0), or (0.0, 1.0) with images.
            cfg_renorm_type (`str`, *optional*):
                `"global"`, `"channel"` or `"text_channel"`: what is scaled back to the unguided length. By default
                `"global"`, or `"text_channel"` with images.
            cfg_renorm_min (`float`, *optional*, defaults to 0.0):
                Smallest factor of that scaling.
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

        Examples:

        Returns:
            [`BagelPipelineOutput`] or `tuple`: the images, and the plans or `None`.

        Raises:
            ValueError: for arguments that cannot work, and if the latents become infinite or NaN.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        self.check_inputs(
            prompt,
            image,
            messages,
            height,
            width,
            num_inference_steps,
            sigmas,
            guidance_scale,
            image_guidance_scale,
            cfg_interval,
            cfg_renorm_type,
            cfg_renorm_min,
            max_think_tokens,
            temperature,
            num_images_per_prompt,
            vae_sample_mode,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        conversations = as_conversations(prompt, image, messages)
        batch_size = len(conversations) * num_images_per_prompt
        generators = as_generators(generator, batch_size)
        inputs = [self.preprocess(conversation, think) for conversation in conversations]
        grids = [self._grid(item, height, width) for item in inputs for _ in range(num_images_per_prompt)]
        self._check_latents(latents, grids)
        self._check_generators(generators)
        for item in inputs:
            self._check_context(item, max_think_tokens if think else 0)

        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False

        # 2. Prepare the contexts, and then the noise: the generator is used in this order
        own_generators = generators[::num_images_per_prompt]
        image_latents = [
            [self.encode_image(pixels, own, vae_sample_mode) for pixels in item.get("vae_pixel_values", [])]
            for item, own in zip(inputs, own_generators, strict=True)
        ]
        guidance = [
            (EDITING if "vae_pixel_values" in item else TEXT_TO_IMAGE).with_changes(
                text_scale=guidance_scale,
                image_scale=image_guidance_scale,
                interval=cfg_interval,
                renorm_type=cfg_renorm_type,
                renorm_min=cfg_renorm_min,
            )
            for item in inputs
        ]
        prepared = self.prepare_batch(
            conversations,
            inputs,
            image_latents,
            guidance,
            think,
            max_think_tokens,
            do_sample,
            temperature,
            own_generators,
        )
        contexts = [own for own, _ in prepared for _ in range(num_images_per_prompt)]
        texts = [plan or "" for _, plan in prepared for _ in range(num_images_per_prompt)]
        guidance = [how for how in guidance for _ in range(num_images_per_prompt)]
        del prepared
        lanes, rows = self._prepare_lanes(contexts, grids, guidance)
        del contexts
        latents = self.prepare_latents(grids, generators, latents)

        # 3. Prepare timesteps: the scheduler shifts them once
        levels = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1] if sigmas is None else torch.tensor(sigmas)
        takes_sigmas = "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler,
            num_inference_steps,
            self._execution_device,
            **({"sigmas": levels.float().numpy()} if takes_sigmas else {}),
        )
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        self._num_timesteps = len(timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        levels = self._noise_levels(timesteps)
        device_levels = levels.to(self._execution_device)
        finite: list[torch.Tensor] = []

        # 4. Denoising loop, in which the host never waits for another device
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                velocity = self._predict_velocity(latents, levels[i], device_levels[i], rows, lanes)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)

                finite.append(torch.isfinite(latents).all())
                if latents.device.type == "cpu":
                    # Here an early stop costs nothing.
                    self._check_finite(finite, levels)
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                if XLA_AVAILABLE:
                    xm.mark_step()
        self._current_timestep = None
        self._check_finite(finite, levels)

        # 5. Decode
        images = self._outputs(latents, rows, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, texts if think else None)
        return BagelPipelineOutput(images=images, texts=texts if think else None)

    def _check_finite(self, finite: list[torch.Tensor], levels: torch.Tensor) -> None:
        """Raise a `ValueError` if the latents of a step were not finite. The host waits for the device to tell."""
        is_finite = [bool(flag) for flag in finite]
        if not all(is_finite):
            self.maybe_free_model_hooks()
            step = is_finite.index(False)
            raise ValueError(
                f"The latents are NaN or infinite after step {step} of {len(levels)} (noise level "
                f"{float(levels[step]):.3f}). Try float32 or bfloat16, or a lower `guidance_scale`."
            )

    def _outputs(self, latents: torch.Tensor, rows: list[_Row], output_type: str) -> Any:
        if len({row.grid for row in rows}) == 1:
            return latents if output_type == "latent" else self.decode_latents(latents, rows[0].grid, output_type)
        images = []
        for row, row_latents in zip(rows, latents, strict=True):
            row_latents = row_latents[: row.num_tokens]
            if output_type == "latent":
                images.append(row_latents)
            else:
                images.append(self.decode_latents(row_latents.unsqueeze(0), row.grid, output_type)[0])
        return images

    def _noise_levels(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise level in [0, 1] of each step, `(steps,)` on the CPU, exact where the scheduler knows it."""
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            return self.scheduler.sigmas[: len(timesteps)].float().cpu()
        return timesteps.float().cpu() / self.scheduler.config.num_train_timesteps

    def _grid(self, inputs: BatchFeature, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of tokens of a drawing: as asked for, else like the last image, else the default size."""
        default = (self.default_sample_size, self.default_sample_size)
        if "vae_pixel_values" in inputs:
            default = tuple(inputs["vae_pixel_values"][-1].shape[1:])
        return (height or default[0]) // self.vae_scale_factor, (width or default[1]) // self.vae_scale_factor

    def _check_context(self, inputs: BatchFeature, max_think_tokens: int) -> None:
        limit = self.transformer.config.text_config.max_position_embeddings
        # The drawing takes one position.
        needed = int(rope_positions(inputs["mm_token_type_ids"])[0, -1]) + 2
        if needed + max_think_tokens > limit:
            plan = f" and `max_think_tokens` of {max_think_tokens}" if max_think_tokens else ""
            raise ValueError(
                f"The prompt of {needed} rope positions{plan} exceeds the {limit} that the model knows "
                "(`max_position_embeddings`). Shorten it."
            )


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop, it included; behind it a batch holds padding."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens


@contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Sample text under a generator's seed without touching the global random state."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(generator.initial_seed())
        yield
