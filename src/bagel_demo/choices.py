# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What somebody chooses on the page, as settings of an answer."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusers_bagel import PRESETS
from diffusers_bagel.few_steps import FewSteps


# As the page calls them, and as `BagelSession.stream` does.
OUTPUTS = {"Picture": "image", "Words": "text", "Both": "interleaved", "Auto": "auto"}
LIKE_THE_LAST = "like the last picture"
NO_PRESET = "none"
# Width to height.
SHAPES = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))


@dataclass(frozen=True)
class Choices:
    """
    What was chosen for one answer.

    Attributes:
        output (`str`): Of `OUTPUTS`.
        preset (`str`): Of `PRESETS`, or `NO_PRESET`: for all that is not on the page.
        think (`bool`): Whether the model thinks first.
        seed (`int`)
        steps (`int`): Of each picture.
        guidance_scale (`float`): Weight of the text.
        image_guidance_scale (`float`): Weight of the pictures; 0 leaves it to the task.
        size (`str`): Of [`sizes`].
        max_new_tokens (`int`): Of each text.
        temperature (`float`): Of words; 0 takes the likeliest.
    """

    output: str = "Picture"
    preset: str = NO_PRESET
    think: bool = False
    seed: int = 0
    steps: int = 49
    guidance_scale: float = 4.0
    image_guidance_scale: float = 0.0
    size: str = LIKE_THE_LAST
    max_new_tokens: int = 1024
    temperature: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Of [`BagelSession.stream`]."""
        width, height = (None, None) if self.size == LIKE_THE_LAST else map(int, self.size.split(" × "))
        return {
            "output": OUTPUTS[self.output],
            "preset": None if self.preset == NO_PRESET else self.preset,
            "think": self.think,
            "generator": torch.Generator().manual_seed(self.seed),
            **self.drawing(),
            "width": width,
            "height": height,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "temperature": self.temperature or None,
            "sanitize_control_tokens": True,
            # Often enough to see it form, rarely enough for decoding to cost little.
            "preview_every": max(1, self.steps // 8),
            "progress": True,
        }

    def drawing(self) -> dict[str, Any]:
        """Settings of steps and guidance."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale or None,
        }

    def described(self) -> dict[str, Any]:
        """What is written into the file of a picture."""
        return asdict(self) | {"output": OUTPUTS[self.output]}

    @classmethod
    def usual(cls, few_steps: FewSteps | None) -> Choices:
        """What the page shows at first; of a model of few steps they are its own."""
        if few_steps is None:
            return cls()
        return cls(
            steps=few_steps.num_inference_steps,
            guidance_scale=few_steps.guidance_scale,
            image_guidance_scale=few_steps.image_guidance_scale,
        )

    @classmethod
    def of_preset(cls, name: str, few_steps: FewSteps | None = None) -> Choices:
        """What the page shows when a preset is chosen, which leaves a model's few steps as they are."""
        usual = cls.usual(few_steps)
        if name == NO_PRESET:
            return usual
        preset = PRESETS[name]
        own = preset.settings if few_steps is None else {**preset.settings, **usual.drawing()}
        # The published number counts the step that feeds the start token.
        longest = own.get("max_new_tokens", own.get("max_think_tokens", usual.max_new_tokens + 1) - 1)
        return cls(
            output={output: shown for shown, output in OUTPUTS.items()}[preset.output],
            preset=name,
            think=own["think"],
            steps=own.get("num_inference_steps", usual.steps),
            guidance_scale=own.get("guidance_scale", usual.guidance_scale),
            image_guidance_scale=own.get("image_guidance_scale", usual.image_guidance_scale),
            max_new_tokens=longest,
            temperature=own["temperature"] if own["do_sample"] else 0.0,
        )


def new_seed() -> int:
    """One that is short enough to be typed again."""
    return secrets.randbelow(10**6)


def sizes(side: int, stride: int) -> list[str]:
    """
    Sizes of pictures to choose from, of about the same area.

    Args:
        side (`int`): Of a square picture in pixels.
        stride (`int`): Pixels that width and height are multiples of.
    """
    found = [LIKE_THE_LAST]
    for across, down in SHAPES:
        longest = max(across, down)
        width, height = (max(stride, side * edge // longest // stride * stride) for edge in (across, down))
        if (name := f"{width} × {height}") not in found:
            found.append(name)
    return found
