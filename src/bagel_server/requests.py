# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Fields of requests: OpenAI's names where they exist, else those of the pipeline's arguments."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from .errors import ApiError, unknown_model
from .settings import ServerSettings


Output = Literal["auto", "text", "image", "interleaved"]
# Under this, the likeliest token is as good as certain, and dividing by it overflows.
_LEAST_TEMPERATURE = 0.01
# Of a pipeline that is told no number.
DEFAULT_STEPS = 49


class Fields(BaseModel):
    """What a request may say about any answer, and what OpenAI's clients send along that changes nothing here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # Of drawing.
    size: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    cfg_interval: list[float] | None = None
    cfg_renorm_type: str | None = None
    cfg_renorm_min: float | None = None
    guidance_tolerance: float | None = None
    preset: str | None = None
    think: bool | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None

    def check(self, settings: ServerSettings) -> None:
        """
        Refuse what the server does not do.

        Raises:
            ApiError: naming the field.
        """
        if self.model is not None and self.model != settings.model:
            raise unknown_model(self.model)
        _at_most("n", self.n, settings.max_choices)
        _at_most("num_inference_steps", self.num_inference_steps, settings.max_steps)
        if self.size not in (None, "auto") and (self.height is not None or self.width is not None):
            raise ApiError("`size` and `height` or `width` were both given. Give one of them.", "size")
        if self.output_compression is not None and (self.output_format or "png") == "png":
            raise ApiError("`output_compression` is for `output_format` jpeg or webp.", "output_compression")

    def drawing(self) -> dict[str, Any]:
        """Settings of drawing, as a session takes them."""
        names = (
            *("num_inference_steps", "guidance_scale", "image_guidance_scale", "cfg_interval", "cfg_renorm_type"),
            *("cfg_renorm_min", "guidance_tolerance", "preset", "think", "height", "width"),
        )
        chosen = {name: getattr(self, name) for name in names}
        if self.size not in (None, "auto"):
            chosen |= dict(zip(("width", "height"), _sides(self.size), strict=True))
        return {name: value for name, value in chosen.items() if value is not None}


class Sampling(Fields):
    """What a request may say about the words of an answer."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_images: Annotated[int, Field(ge=1)] | None = None
    output: Output | None = None
    preview_every: Annotated[int, Field(ge=1)] | None = None

    def sampling(self) -> dict[str, Any]:
        """Settings of sampling, as a session takes them; without any, the likeliest token is taken."""
        if self.temperature is None and self.top_p in (None, 1):
            return {}
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < _LEAST_TEMPERATURE:
            return {}
        if self.top_p in (None, 1):
            return {"do_sample": True, "temperature": temperature}
        # The scores are cut off behind the temperature, as OpenAI does and `generate`, too.
        processors = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(self.top_p)]
        return {"do_sample": True, "temperature": 1.0, "logits_processor": processors}


def _sides(size: str | None) -> tuple[int, int]:
    """Width and height, of `"1024x768"`."""
    sides = (size or "").split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and len(side) <= 5 for side in sides):
        raise ApiError('`size` must be "auto" or width and height, such as "1024x1024".', "size", code="invalid_value")
    return int(sides[0]), int(sides[1])


def _at_most(name: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        message = f"`{name}` must be at most {limit} on this server, got {str(value)[:32]}."
        raise ApiError(message, name, code="invalid_value")


def lengths(settings: ServerSettings, max_images: int | None = None, **tokens: int | None) -> dict[str, int]:
    """
    How long an answer is to become, as far as a request says it.

    Args:
        settings ([`ServerSettings`])
        max_images (`int`, *optional*): Of the request.
        tokens (`int`, *optional*): Of the request, under the name of its field.

    Raises:
        ApiError: naming the field that is above the limit.
    """
    _at_most("max_images", max_images, settings.max_drawn)
    for name, value in tokens.items():
        _at_most(name, value, settings.max_new_tokens)
    (longest,) = tokens.values() or (None,)
    chosen = {"max_new_tokens": longest, "max_images": max_images}
    return {name: value for name, value in chosen.items() if value is not None}


def preview_every(steps: int, count: int) -> int:
    """After how many steps previews are due, for a picture to have as many as asked for."""
    return math.ceil(steps / (count + 1))


def refuse(request: BaseModel, unsupported: dict[str, tuple[Any, ...]]) -> None:
    """
    Refuse fields of OpenAI's that would change the answer, and which this server does not know to follow.

    Args:
        request (`BaseModel`)
        unsupported (`dict[str, tuple]`): By field, the values under which the answer stays what it is.

    Raises:
        ApiError: naming the field.
    """
    for name, harmless in unsupported.items():
        value = getattr(request, name)
        if value is not None and not any(value == other and type(value) is type(other) for other in harmless):
            raise ApiError(
                f"`{name}` is not supported here, or not with this value.", name, code="unsupported_parameter"
            )


def generator_of(seed: int, choice: int) -> torch.Generator:
    """The generator of one of the answers to a request."""
    return torch.Generator("cpu").manual_seed((seed + choice + 2**63) % 2**64 - 2**63)
