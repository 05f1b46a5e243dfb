# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What somebody chooses on the page, as settings of an answer."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass
from typing import Any

import torch


# As the page calls them, and as `BagelSession.stream` does.
OUTPUTS = {"Picture": "image", "Words": "text", "Both": "interleaved", "It decides": "auto"}
LIKE_THE_LAST = "like the last picture"
# Width to height.
SHAPES = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))


@dataclass(frozen=True)
class Choices:
    """
    What was chosen for one answer.

    Attributes:
        output (`str`): Of `OUTPUTS`.
        think (`bool`): Whether the model thinks first.
        seed (`int`)
        steps (`int`): Of each picture.
        guidance_scale, image_guidance_scale (`float`): Weights of the text and of the pictures.
        size (`str`): Of [`sizes`].
        max_new_tokens (`int`): Of each text.
        temperature (`float`): Of words; 0 takes the likeliest.
    """

    output: str = "Picture"
    think: bool = False
    seed: int = 0
    steps: int = 49
    guidance_scale: float = 4.0
    image_guidance_scale: float = 2.0
    size: str = LIKE_THE_LAST
    max_new_tokens: int = 1024
    temperature: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Of [`BagelSession.stream`]."""
        width, height = (None, None) if self.size == LIKE_THE_LAST else map(int, self.size.split(" × "))
        return {
            "output": OUTPUTS[self.output],
            "think": self.think,
            "generator": torch.Generator().manual_seed(self.seed),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "width": width,
            "height": height,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "temperature": self.temperature or None,
            "sanitize_control_tokens": True,
            # Often enough to see it form, rarely enough for decoding to cost little.
            "preview_every": max(1, self.steps // 8),
        }

    def described(self) -> dict[str, Any]:
        """What is written into the file of a picture."""
        return asdict(self)


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
