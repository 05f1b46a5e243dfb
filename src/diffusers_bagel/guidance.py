# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL's guidance: against a context without the last text, and against one without images.

Source: original behaviour, points 16-19.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch


RENORM_TYPES = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class BagelGuidance:
    """
    How the velocities of the three contexts are joined.

    Args:
        text_scale (`float`): Weight of the last text; at most 1 turns guidance off, the image scale too.
        image_scale (`float`): Weight of the images; at most 1 turns this part off.
        interval (`tuple[float, float]`): Guidance is on for sigmas `low < sigma <= high`.
        renorm_type (`str`): What is scaled back to the length of the unguided velocity: the whole latent
            (`"global"`), each token (`"channel"`), or each token before the images are weighed (`"text_channel"`).
        renorm_min (`float`): Smallest factor of that scaling.
    """

    text_scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm_type: str
    renorm_min: float

    def is_on(self, timestep: torch.Tensor) -> bool:
        """Whether guidance applies at a sigma, which is compared in its own float32 as in the original code."""
        low, high = self.interval
        return self.text_scale > 1 and bool((timestep > low) & (timestep <= high))

    def branches(self, timestep: torch.Tensor) -> tuple[str, ...]:
        """Contexts whose velocity is needed at a sigma."""
        if not self.is_on(timestep):
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_scale > 1 else ("full", "no_text")

    def __call__(self, velocities: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        The guided velocity of one sample (point 17).

        Args:
            velocities (`dict[str, torch.Tensor]`):
                By context, each `(tokens, latent_dim)` of one sample.

        Returns:
            `torch.Tensor` of shape `(tokens, latent_dim)`, float32.
        """
        velocity = velocities["full"].float()
        if "no_text" not in velocities:
            return velocity
        no_text = velocities["no_text"].float()
        guided = no_text + self.text_scale * (velocity - no_text)
        if self.renorm_type == "text_channel":
            guided = self._renormed(guided, velocity, dim=-1)
        if "no_image" in velocities:
            no_image = velocities["no_image"].float()
            guided = no_image + self.image_scale * (guided - no_image)
        if self.renorm_type == "global":
            guided = self._renormed(guided, velocity, dim=(-2, -1))
        elif self.renorm_type == "channel":
            guided = self._renormed(guided, velocity, dim=-1)
        return guided

    def _renormed(self, guided: torch.Tensor, velocity: torch.Tensor, dim: int | tuple[int, int]) -> torch.Tensor:
        lengths = (torch.linalg.vector_norm(states, dim=dim, keepdim=True) for states in (velocity, guided))
        length, guided_length = lengths
        return guided * (length / (guided_length + 1e-8)).clamp(min=self.renorm_min, max=1.0)

    def with_changes(self, **changes: Any) -> "BagelGuidance":
        """The same guidance with other values; those that are `None` stay."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


TEXT_TO_IMAGE = BagelGuidance(4.0, 1.0, (0.4, 1.0), "global", 0.0)
EDITING = BagelGuidance(4.0, 2.0, (0.0, 1.0), "text_channel", 0.0)
