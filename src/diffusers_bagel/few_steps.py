# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What weights of few steps say beside their numbers, in the file of an adapter or the configuration of a model that one was merged
into: the steps that they were made for, and of which model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from diffusers.utils import logging
from torch import nn

from transformers_bagel.adapters import adapter_notes, merged_adapters
from transformers_bagel.errors import shown

from .adapter_scale import lock_of, lora_layers
from .inputs import MAX_STEPS, check_number, check_sigmas, check_timestep_shift, check_whole_number, takes_sigmas


logger = logging.get_logger(__name__)

_SCALES = ("guidance_scale", "image_guidance_scale")

# Of the file's settings, beside those of peft, which begin with `transformer.`.
PREFIX = "few_steps."
# How many values of each matrix tell models apart, and how far they may lie apart: types round by less.
SAMPLE_SIZE = 2
TOLERANCE = {"rel_tol": 0.01, "abs_tol": 1e-6}


@dataclass(frozen=True)
class FewSteps:
    """
    How an adapter wants to be drawn with.

    Attributes:
        num_inference_steps (`int`)
        sigmas (`list[float]`): Of the steps, before the shift.
        guidance_scale, image_guidance_scale (`float`): 1 where guidance is in the weights.
        timestep_shift (`float`): Of the scheduler that it was made with.
        base (`dict[str, list[float]]`): Values of the model that it was made for, by the name of the layer. Nothing is known of
            the model that an adapter was merged into.
    """

    num_inference_steps: int
    sigmas: list[float]
    guidance_scale: float
    image_guidance_scale: float
    timestep_shift: float
    base: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_whole_number("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_sigmas(self.sigmas)
        if len(self.sigmas) != self.num_inference_steps:
            raise ValueError(f"`sigmas` must be {self.num_inference_steps}, got {len(self.sigmas)}.")
        for name in _SCALES:
            check_number(name, getattr(self, name), 0)
        check_number("timestep_shift", self.timestep_shift, 1e-6)
        if not isinstance(self.base, dict):
            raise TypeError(f"`base` must be values by the name of their layer, got {shown(self.base)}.")
        for values in self.base.values():
            for value in values:
                check_number("base", value, -1e9)

    @classmethod
    def of(cls, pipe: Any, num_inference_steps: int) -> FewSteps:
        """Of an adapter that is made for even steps of a pipeline, with guidance in its weights."""
        sigmas = torch.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        shift = float(pipe.scheduler.config.shift)
        return cls(num_inference_steps, sigmas, 1.0, 1.0, shift, values_of(pipe.transformer))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str) -> FewSteps:
        """
        What was written down.

        Raises:
            ValueError: naming the source, if something is missing, or cannot be drawn with.
        """
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: the settings of a few-step adapter are broken: {error}") from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any] | None, source: str) -> FewSteps | None:
        """What the settings of a LoRA's file say, if they do; see [`FewSteps.from_settings`]."""
        found = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items() if key.startswith(PREFIX)}
        return cls.from_settings(found, source) if found else None

    def metadata(self) -> dict[str, Any]:
        """For the file of an adapter."""
        return {f"{PREFIX}{name}": value for name, value in dataclasses.asdict(self).items()}

    def merged(self) -> dict[str, Any]:
        """For the configuration of a model that the adapter is merged into."""
        settings = dataclasses.asdict(self)
        del settings["base"]
        return settings

    def is_of(self, values: Mapping[str, list[float]]) -> bool:
        """Whether it was made for a model with these [`values_of`], as far as both tell; quantised weights tell nothing."""
        return all(
            math.isclose(own, other, **TOLERANCE)
            for name in self.base.keys() & values.keys()
            for own, other in zip(self.base[name], values[name], strict=False)
        )

    def introduce(self, name: str, is_of_this_model: bool, is_active: bool, scheduler: Any) -> None:
        """Say what an adapter changes, and what does not fit."""
        logger.warning(
            f"The adapter '{name}' draws in {self.num_inference_steps} steps with guidance_scale={self.guidance_scale:g} and "
            f"image_guidance_scale={self.image_guidance_scale:g}, which "
            + ("are now the defaults." if is_active else "are the defaults where it is active.")
        )
        if not is_of_this_model:
            logger.warning(f"The adapter '{name}' was made for a model with other weights: its pictures may be worse.")
        if (shift := scheduler.config.get("shift")) != self.timestep_shift:
            consequence = "drawings get the adapter's" if hasattr(scheduler, "set_shift") else "it takes no other"
            logger.warning(
                f"The adapter '{name}' was made with a scheduler of shift={self.timestep_shift:g}; this one has {shown(shift)}: "
                f"{consequence}."
            )

    def defaults(self, scheduler: Any) -> dict[str, Any]:
        """Settings of the pipeline's `__call__`, as far as a scheduler takes them."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("num_inference_steps", *_SCALES)}
        if takes_sigmas(scheduler):
            own["sigmas"] = self.sigmas
        if hasattr(scheduler, "set_shift"):
            own["timestep_shift"] = self.timestep_shift
        return own

    def over(self, settings: dict[str, Any], given: Mapping[str, Any], scheduler: Any) -> dict[str, Any]:
        """
        Defaults of a drawing, with the adapter's in the place of others.

        Args:
            settings (`dict`): Other defaults, by the names of the pipeline's `__call__`.
            given (`Mapping`): What the caller passes, which is no part of the result.
            scheduler (`SchedulerMixin`): What makes the noise levels.

        Raises:
            TypeError, ValueError: naming what the caller passes, if it cannot work.
        """
        given = {name: value for name, value in given.items() if value is not None}
        check_sigmas(given.get("sigmas"))
        check_whole_number("num_inference_steps", given.get("num_inference_steps", 1), 1, MAX_STEPS)
        own = self.defaults(scheduler)
        if self._steps_of(given) != self.num_inference_steps:
            own.pop("sigmas", None)
        return settings | own

    def warn_of(self, given: Mapping[str, Any], scheduler: Any) -> None:
        """
        Say what the caller gave against the adapter, and what the scheduler cannot be given.

        Args:
            given (`Mapping`), scheduler (`SchedulerMixin`): As in [`FewSteps.over`].

        Raises:
            TypeError, ValueError: naming what the caller passes, if it cannot work.
        """
        given = {name: value for name, value in given.items() if value is not None}
        check_timestep_shift(given.get("timestep_shift"), scheduler)
        for name in _SCALES:
            check_number(name, given.get(name, 1.0), 0)
            if given.get(name, 1.0) > 1:
                logger.warning(f"`{name}` is {given[name]:g}, and guidance is in the adapter's weights: leave it out.")
        own = self.defaults(scheduler)
        if (steps := self._steps_of(given)) != self.num_inference_steps:
            logger.warning(f"The adapter was made for {self.num_inference_steps} steps, and this call has {steps}.")
        elif not _is_close(given.get("sigmas", self.sigmas), self.sigmas):
            logger.warning(
                f"`sigmas` are {_listed(given['sigmas'])}, and the adapter was made for {_listed(self.sigmas)}."
            )
        elif "sigmas" not in own:
            logger.warning(
                f"{type(scheduler).__name__} makes its own `sigmas`, and the adapter was made for {_listed(self.sigmas)}."
            )
        shift = given.get("timestep_shift", own.get("timestep_shift", scheduler.config.get("shift")))
        if shift != self.timestep_shift:
            logger.warning(
                f"The shift of the noise levels is {shown(shift)}, and the adapter was made with {self.timestep_shift:g}."
            )

    def _steps_of(self, given: Mapping[str, Any]) -> int:
        return (
            len(given["sigmas"]) if "sigmas" in given else given.get("num_inference_steps", self.num_inference_steps)
        )


def few_steps_of(transformer: Any, attention_kwargs: Any = None) -> FewSteps | None:
    """
    How a model wants to be drawn with: as the first adapter of few steps that it draws with; else as its configuration says, of one
    that was merged into its weights.

    Args:
        transformer ([`BagelForConditionalGeneration`])
        attention_kwargs (`dict`, *optional*): Of a call, whose `scale` of 0 leaves adapters out that are not fused.
    """
    settings = getattr(getattr(transformer, "config", None), "few_steps", None)
    own = None if settings is None else FewSteps.from_settings(settings, "`config.few_steps`")
    return next(iter(few_steps_in_effect(transformer, attention_kwargs).values()), own)


def few_steps_in_effect(transformer: Any, attention_kwargs: Any = None) -> dict[str, FewSteps]:
    """How the adapters that a model draws with want it, by their names, of those that were made for few steps; see
    [`few_steps_of`]."""
    names = getattr(transformer, "peft_config", {})
    known = {name: notes for name in names if (notes := adapter_notes(transformer, name)).get("few_steps")}
    if not known:
        return {}
    is_off = isinstance(attention_kwargs, dict) and attention_kwargs.get("scale") == 0
    # In the forward of another call the layers have its `scale`.
    with lock_of(transformer):
        found = dict.fromkeys(name for layer in lora_layers(transformer) for name in _in_effect(layer, is_off, known))
    return {name: known[name]["few_steps"] for name in found}


def note_strength_of_merged(transformer: Any, but: set[str]) -> None:
    """Write down how strong the adapters are that were merged just now, behind others: weights that are set later change nothing of
    them."""
    for name in merged_adapters(transformer) - but:
        strengths = [abs(layer.scaling[name]) for layer in lora_layers(transformer) if name in layer.merged_adapters]
        adapter_notes(transformer, name)["merged_strength"] = max(strengths)


def without_few_steps(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of a LoRA's file for peft, or `None` if it has none."""
    return {key: value for key, value in (metadata or {}).items() if not key.startswith(PREFIX)} or None


def values_of(transformer: Any) -> dict[str, list[float]]:
    """The first values of each linear layer, without adapters, wherever its weights lie. They are rounded to
    bfloat16, as the published weights are: the same in whatever type a model is loaded."""
    values = {}
    # What is compiled has the names of what is inside.
    for name, module in getattr(transformer, "_orig_mod", transformer).named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            # Where they wait for their forward: nothing has to be moved.
            with align_module_device(module, "cpu"):
                weight = module.weight.data
                # Types of one byte are quantised, too, and torch's own.
                if type(weight) is torch.Tensor and weight.is_floating_point() and weight.element_size() > 1:
                    first = weight.flatten()[:SAMPLE_SIZE]
                    values[name.removesuffix(".base_layer")] = first.bfloat16().float().tolist()
    return values


def _in_effect(layer: Any, is_off: bool, known: Mapping[str, Any]) -> list[str]:
    """Names of the adapters that a layer of peft computes with, of those that are known. Where some are merged, it computes with
    no others."""
    if layer.disable_adapters:
        return []
    if layer.merged:
        return [name for name in layer.merged_adapters if name in known and known[name].get("merged_strength", 1.0)]
    return [name for name in layer.active_adapters if name in known and layer.scaling.get(name) and not is_off]


def _is_close(values: Any, others: list[float]) -> bool:
    """Whether noise levels are equal in the digits that [`_listed`] shows."""
    return all(math.isclose(value, other, abs_tol=1e-3) for value, other in zip(values, others, strict=True))


def _listed(levels: Any) -> str:
    return ", ".join(f"{level:.3g}" for level in levels)
