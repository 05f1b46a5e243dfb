# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the file of a few-step adapter says beside its weights: the steps that it was made for, and of which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.utils import logging

from transformers_bagel.errors import shown

from .inputs import check_number, check_sigmas


logger = logging.get_logger(__name__)

_SCALES = {"guidance_scale", "image_guidance_scale"}

# Of the file's settings, beside those of peft, which begin with `transformer.`.
PREFIX = "few_steps."
# How many values of a weight tell models apart.
SAMPLE_SIZE = 32


@dataclass(frozen=True)
class FewSteps:
    """
    How an adapter wants to be drawn with.

    Attributes:
        num_inference_steps (`int`)
        sigmas (`list[float]`): Of the steps, before the scheduler's shift.
        guidance_scale, image_guidance_scale (`float`): 1 where guidance is in the weights.
        timestep_shift (`float`): Of the scheduler that it was made with.
        base (`list[float]`): Values of the model that it was made for.
    """

    num_inference_steps: int
    sigmas: list[float]
    guidance_scale: float
    image_guidance_scale: float
    timestep_shift: float
    base: list[float]

    @classmethod
    def of(cls, pipe: Any, num_inference_steps: int) -> FewSteps:
        """Of an adapter that is made for even steps of a pipeline, with guidance in its weights."""
        sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        return cls(
            num_inference_steps, sigmas, 1.0, 1.0, float(pipe.scheduler.config.shift), values_of(pipe.transformer)
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any] | None) -> FewSteps | None:
        """What the settings of a LoRA's file say, if they do.

        Raises:
            ValueError: if something is missing, or no such number.
        """
        found = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items() if key.startswith(PREFIX)}
        if not found:
            return None
        try:
            own = cls(**found)
            numbers = [own.guidance_scale, own.image_guidance_scale, own.timestep_shift, *own.sigmas, *own.base]
            is_right = own.num_inference_steps == len(own.sigmas) >= 1 and all(map(_is_number, numbers))
        except TypeError:
            is_right = False
        if not is_right:
            raise ValueError(f"the settings of a few-step adapter are broken: {shown(found)}.")
        return own

    def metadata(self) -> dict[str, Any]:
        """For the file."""
        return {f"{PREFIX}{name}": value for name, value in asdict(self).items()}

    def introduce(self, name: str, pipe: Any) -> None:
        """Say what an adapter changes, and what does not fit."""
        logger.warning(
            f"The adapter '{name}' draws in {self.num_inference_steps} steps with guidance_scale={self.guidance_scale:g} and "
            f"image_guidance_scale={self.image_guidance_scale:g}, which are now the defaults."
        )
        values = values_of(pipe.transformer)
        if sum(own != other for own, other in zip(values, self.base, strict=False)) > len(self.base) / 2:
            logger.warning(f"The adapter '{name}' was made for a model with other weights: its pictures may be worse.")
        shift = pipe.scheduler.config.get("shift")
        if shift != self.timestep_shift:
            logger.warning(
                f"The adapter '{name}' was made with a scheduler of shift={self.timestep_shift:g}; this one has {shift}."
            )

    def over(self, settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """
        Defaults of a drawing, with the adapter's in the place of others. What the caller gave against them is warned of.

        Args:
            settings (`dict`): Other defaults, by the names of the pipeline's `__call__`.
            given (`Mapping`): What the caller passes, which is no part of the result.

        Raises:
            TypeError, ValueError: naming what the caller passes, if it is no scale, or no noise levels.
        """
        given = {name: value for name, value in given.items() if value is not None}
        own: dict[str, Any] = {name: getattr(self, name) for name in _SCALES}
        check_sigmas(given.get("sigmas"))
        for name in sorted(_SCALES & given.keys()):
            check_number(name, given[name], 0)
            if given[name] > 1:
                logger.warning(f"`{name}` is {given[name]:g}, and guidance is in the adapter's weights: leave it out.")
        if given.keys() & {"num_inference_steps", "sigmas"}:
            steps = len(given["sigmas"]) if "sigmas" in given else given["num_inference_steps"]
            if steps != self.num_inference_steps:
                logger.warning(
                    f"The adapter was made for {self.num_inference_steps} steps, and this call has {steps}."
                )
        else:
            own |= {"num_inference_steps": self.num_inference_steps, "sigmas": self.sigmas}
        return settings | own


def without_few_steps(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of a LoRA's file for peft."""
    if metadata is None:
        return None
    return {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}


def values_of(transformer: Any) -> list[float]:
    """A few values of what leads out of the decoder, as bfloat16 has them: the same in whatever type a model is loaded."""
    weight = transformer.model.llm2vae.weight
    return weight.detach().flatten()[:SAMPLE_SIZE].bfloat16().float().cpu().tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
