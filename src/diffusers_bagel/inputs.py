# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The pipeline's arguments: refused by name before anything is computed, or turned into conversations."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from transformers_bagel.arrays import unbatched
from transformers_bagel.errors import shown
from transformers_bagel.scalars import plain_number, plain_numbers
from transformers_bagel.segments import check_conversation, content_parts

from .guidance import RENORM_TYPES


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Far above what makes sense, and far below what fills the memory before anything is drawn.
MAX_STEPS = 10_000
MAX_IMAGES_PER_PROMPT = 1_000
# Place of the image whose size a drawing has.
SIZE_RULES = {"first": 0, "last": -1}
# Of `BagelImageProcessor`, what is not the model's.
IMAGES_KWARGS = ("vae_size", "size", "resize_before_vit", "max_pixels")


def with_plain_numbers(method: Callable) -> Callable:
    """Let a method take numbers of numpy and torch: it gets Python's, see [`plain_numbers`]."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name: plain_numbers(value) for name, value in kwargs.items()}
        return method(self, *map(plain_numbers, args), **named)

    return called


def check_whole_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """
    Refuse what is no whole number, too small or too large.

    Raises:
        TypeError: if `value` is no whole number.
        ValueError: if it is below `least` or above `most`.
    """
    value = plain_number(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a whole number, got {shown(value)}.")
    if value < least or (most is not None and value > most):
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"`{name}` must be {bound}, got {shown(value)}.")


def check_number(name: str, value: Any, low: float, high: float = 1e9, what: str = "") -> None:
    """
    Refuse what is no number within bounds.

    Raises:
        TypeError: if `value` is no number.
        ValueError: if it lies outside [low, high].
    """
    value = plain_number(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number{what}, got {shown(value)}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be a number{what} of at least {low} and at most {high}, got {shown(value)}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """
    Refuse what is none of the choices.

    Raises:
        ValueError: if `value` is none of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {shown(value)}.")


def check_output_type(output_type: Any, vae: Any) -> None:
    """
    Refuse an output that is unknown, or that a pipeline without a VAE cannot give.

    Raises:
        ValueError
    """
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if vae is None and output_type != "latent":
        raise ValueError(
            f"`output_type='{output_type}'`: the pipeline has no `vae` to decode with. Load it with one, or ask for 'latent'."
        )


def check_flag(name: str, value: Any) -> None:
    """
    Refuse what is neither true nor false.

    Raises:
        TypeError: for a tensor or an array of several values.
    """
    try:
        bool(value)
    except (RuntimeError, ValueError) as error:
        raise TypeError(f"`{name}` must be true or false, got {shown(value)}.") from error


def check_size(name: str, value: Any, stride: int, limit: int | None) -> None:
    """
    Refuse a height or width that the model cannot draw.

    Raises:
        TypeError: if a side of the drawing is no whole number.
        ValueError: if it is no multiple of the stride, or beyond the position table (`limit` pixels, if any).
    """
    if value is None:
        return
    check_whole_number(name, value, 1)
    if value % stride:
        raise ValueError(f"`{name}` must be a multiple of {stride}, got {value}.")
    if limit is not None and value > limit:
        raise ValueError(f"`{name}` must be at most {limit}, where the model's position table ends, got {value}.")


def check_guidance(
    guidance_scale: Any, image_guidance_scale: Any, cfg_interval: Any, cfg_renorm_type: Any, cfg_renorm_min: Any
) -> None:
    """
    Refuse settings of guidance that cannot work.

    Raises:
        TypeError: if a setting of the guidance has the wrong type.
        ValueError: if it has an impossible value.
    """
    check_number("guidance_scale", guidance_scale, 0)
    if image_guidance_scale is not None:
        check_number("image_guidance_scale", image_guidance_scale, 0)
    if cfg_interval is not None:
        cfg_interval = cfg_interval.tolist() if hasattr(cfg_interval, "tolist") else cfg_interval
        if not isinstance(cfg_interval, (list, tuple)) or len(cfg_interval) != 2:
            raise TypeError(f"`cfg_interval` must be a pair (low, high), got {shown(cfg_interval)}.")
        for bound in cfg_interval:
            check_number("cfg_interval", bound, 0, what=" in each of its two places")
        if cfg_interval[0] > cfg_interval[1]:
            raise ValueError(
                f"`cfg_interval` must be (low, high) with low <= high, got {tuple(cfg_interval)}: guidance is on for "
                "noise levels low < t <= high."
            )
    if cfg_renorm_type is not None:
        check_choice("cfg_renorm_type", cfg_renorm_type, RENORM_TYPES)
    check_number("cfg_renorm_min", cfg_renorm_min, 0, 1)


def check_guidance_tolerance(guidance_tolerance: Any, has_step_cache: bool) -> None:
    """
    Refuse a tolerance that is none, or beside something else that leaves out forwards.

    Raises:
        TypeError, ValueError: naming it.
    """
    if guidance_tolerance is None:
        return
    check_number("guidance_tolerance", guidance_tolerance, 0, 1)
    if has_step_cache:
        raise ValueError(
            "`guidance_tolerance` was passed, but the pipeline's step cache leaves out forwards, too, and neither knows what "
            "the other does. Leave it out, or disable the cache."
        )


def check_sigmas(sigmas: Any) -> None:
    """
    Refuse sigmas that are no decreasing series within (0, 1].

    Raises:
        TypeError: if `sigmas` is no list of numbers.
        ValueError: if they are not decreasing within (0, 1].
    """
    if sigmas is None:
        return
    values = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"`sigmas` must be a list of noise levels, got {shown(sigmas)}.")
    for value in values:
        check_number("sigmas", value, 0, 1, what=" in each of its places")
    if not values or 0 in values or any(later >= sooner for sooner, later in zip(values, values[1:], strict=False)):
        raise ValueError(f"`sigmas` must be decreasing noise levels in (0, 1], before the shift, got {shown(sigmas)}.")


def takes_sigmas(scheduler: Any) -> bool:
    """Whether a scheduler can be given the sigmas of its steps."""
    return "sigmas" in inspect.signature(scheduler.set_timesteps).parameters


def check_scheduler(scheduler: Any, sigmas: Any = None) -> None:
    """
    Refuse a scheduler that does not integrate velocities: its pictures would be noise.

    Raises:
        ValueError: naming the scheduler, or if it takes no `sigmas` and some were passed.
    """
    name, config = type(scheduler).__name__, scheduler.config
    is_flow = "FlowMatch" in name or (
        config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    )
    if not is_flow:
        raise ValueError(
            f"`scheduler` is a {name}, which is not set up for flow matching. Use a FlowMatchEulerDiscreteScheduler, or "
            'one with `use_flow_sigmas=True` and `prediction_type="flow_prediction"`.'
        )
    if sigmas is not None and not takes_sigmas(scheduler):
        raise ValueError(f"`sigmas` were passed, but {name} makes its own. Leave them out.")


def check_timestep_shift(shift: Any, scheduler: Any) -> None:
    """
    Refuse a shift that is none, or that a scheduler cannot be given.

    Raises:
        TypeError, ValueError: naming it.
    """
    if shift is None:
        return
    check_number("timestep_shift", shift, 1e-6)
    if not hasattr(scheduler, "set_shift"):
        raise ValueError(
            f"`timestep_shift` was passed, but {type(scheduler).__name__} takes none. Leave it out, or use a "
            "FlowMatchEulerDiscreteScheduler."
        )


def with_residual_dtype(attention_kwargs: dict[str, Any] | None, dtype: Any) -> dict[str, Any] | None:
    """
    What the transformer is told in each forward, with the type of its hidden states.

    Raises:
        ValueError: if it is another type than float32: narrower ones only lose.
    """
    if dtype is None:
        return attention_kwargs
    if dtype not in ("float32", torch.float32):
        raise ValueError(
            f'`residual_dtype` must be "float32", or `None` for the type of the weights, got {shown(dtype)}.'
        )
    return (attention_kwargs or {}) | {"residual_dtype": torch.float32}


def check_images_kwargs(images_kwargs: Any) -> None:
    """
    Refuse settings of images that are none; their values are refused by the image processor.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it names something else.
    """
    if images_kwargs is None:
        return
    if not isinstance(images_kwargs, dict):
        raise TypeError(f"`images_kwargs` must be a dict, got {shown(images_kwargs)}.")
    for name in images_kwargs:
        if name not in IMAGES_KWARGS:
            raise ValueError(f"`images_kwargs` must hold {', '.join(IMAGES_KWARGS)} only, got {shown(name)}.")


def check_latents(latents: Any, grids: Sequence[tuple[int, int]], latent_dim: int) -> None:
    """
    Refuse noise that does not fit the images to be drawn.

    Raises:
        ValueError: if it has another shape or type.
    """
    if latents is None:
        return
    shape = (len(grids), max(rows * columns for rows, columns in grids), latent_dim)
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape:
        given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`latents` must be packed noise of shape {shape} (batch, tokens, latent_dim), got {given}.")
    if latents.dtype != torch.float32:
        raise ValueError(f"`latents` must be float32, got {latents.dtype}. Pass `latents.float()`.")


def check_prompt(prompt: Any, image: Any, messages: Any) -> None:
    """
    Refuse prompts that leave open what to draw.

    Raises:
        TypeError: if `prompt` is neither a string nor a list of strings.
        ValueError: if there is nothing to draw, or too much.
    """
    if prompt is not None and messages is not None:
        raise ValueError("`prompt` and `messages` were both passed. Put the prompt into the messages.")
    if messages is not None and image is not None:
        raise ValueError("`image` and `messages` were both passed. Put the images into the messages.")
    if prompt is None and messages is None:
        raise ValueError("Pass `prompt`, or `messages` for anything interleaved.")
    if messages is not None:
        check_conversation(messages, "messages")
        if not all(any(map(content_parts, conversation)) for conversation in as_conversations(None, None, messages)):
            raise ValueError("`messages` holds a conversation without text and image. Say what to draw.")
        return
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(item, str) for item in prompts):
        raise TypeError(f"`prompt` must be a string or a list of strings, got {shown(prompt)}.")
    if not prompts:
        raise ValueError("`prompt` is an empty list. Pass at least one prompt.")


def check_callback(callback: Callable | None, names: Any, known: list[str]) -> None:
    """
    Refuse a callback that the pipeline cannot serve.

    Raises:
        TypeError: if the callback cannot be called.
        ValueError: if it asks for a tensor that the pipeline does not pass on.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be a function, got {shown(callback)}.")
    if not isinstance(names, (list, tuple)) or not all(name in known for name in names):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has to be in {known}, but found {shown(names)}")


def check_callback_outputs(outputs: Any) -> dict[str, Any]:
    """
    What a callback has returned.

    Raises:
        TypeError: if it is no dict of tensors.
    """
    if not isinstance(outputs, dict):
        raise TypeError(
            f"`callback_on_step_end` must return a dict, such as that of its tensors, got {shown(outputs)}."
        )
    return outputs


def as_generators(generator: Any, batch_size: int) -> list[torch.Generator | None]:
    """One generator, or `None`, for each image.

    Raises:
        TypeError: if one of them is no [`torch.Generator`].
        ValueError: if a list has another length than there are images.
    """
    if not isinstance(generator, (list, tuple)):
        generator = [generator] * batch_size
    for item in generator:
        if item is not None and not isinstance(item, torch.Generator):
            raise TypeError(f"`generator` must be a `torch.Generator` or a list of them, got {shown(item)}.")
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, but {batch_size} images were asked for. Pass one for each."
        )
    return list(generator)


def _images(value: Any) -> list[Any]:
    """The images of one prompt."""
    images = unbatched(value)
    return images if isinstance(images, list) else [images]


def as_conversations(prompt: Any, image: Any, messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation for each prompt: its images, then its text. Messages pass through.

    Raises:
        ValueError: if there are images of more or fewer prompts than there are prompts.
    """
    if messages is not None:
        return messages if isinstance(messages[0], (list, tuple)) else [messages]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    image = unbatched(image)
    if image is None:
        images: list[list[Any]] = [[] for _ in prompts]
    elif not isinstance(image, list):
        images = [[image] for _ in prompts]
    elif isinstance(prompt, str) and not any(isinstance(item, (list, tuple)) for item in image):
        images = [[nested for item in image for nested in _images(item)]]
    else:
        images = [_images(item) for item in image]
    if len(images) != len(prompts):
        raise ValueError(
            f"`image` holds images of {len(images)} prompts, but `prompt` holds {len(prompts)}. Pass an image, or a list of "
            "them, for each prompt."
        )
    for item in (nested for items in images for nested in items):
        if item is None or isinstance(item, (list, tuple)):
            raise ValueError(f"`image` must hold images, one or a list or a list of lists, got {shown(item)} for one.")
    return [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": item} for item in items), {"type": "text", "text": text}],
            }
        ]
        for items, text in zip(images, prompts, strict=True)
    ]
