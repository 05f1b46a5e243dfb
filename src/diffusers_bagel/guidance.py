# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL's guidance: against a context without the last text, and against one without images.

Source: original behaviour, points 16-19.
"""

from collections.abc import Iterable
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
        tolerance (`float`, *optional*): See [`HeldBranches`]; by default every branch is computed at every step.
    """

    text_scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm_type: str
    renorm_min: float
    tolerance: float | None = None

    def is_on(self, timestep: torch.Tensor) -> bool:
        """Whether guidance applies at a sigma, which is compared in its own float32 as in the original code."""
        low, high = self.interval
        return self.text_scale > 1 and bool((timestep > low) & (timestep <= high))

    def branches(self, timestep: torch.Tensor) -> tuple[str, ...]:
        """Contexts whose velocity is needed at a sigma."""
        if not self.is_on(timestep):
            return ("full",)
        return ("full", "no_text", "no_image") if self.image_scale > 1 else ("full", "no_text")

    def weight(self, branch: str) -> float:
        """How strongly the guided velocity goes by that of a branch other than the full one, before it is scaled back."""
        of_images = max(self.image_scale, 1.0)
        return of_images - 1 if branch == "no_image" else (self.text_scale - 1) * of_images

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


@dataclass
class HeldBranch:
    """
    By how much the full velocity and that of a branch differ.

    Attributes:
        difference (`torch.Tensor` of shape `(tokens, latent_dim)`), sigma (`float`): As of when it was last computed.
        change (`torch.Tensor` of shape `()` or `float`, *optional*):
            How fast that moves the guided velocity, relative to the length of the full one, by unit of sigma.
    """

    difference: torch.Tensor
    sigma: float
    change: torch.Tensor | float | None = None

    def is_due(self, sigma: float, tolerance: float) -> bool:
        """Whether it has to be computed again at a noise level."""
        if self.change is None:
            return True
        # On an accelerator the host waits here for the step before, once for each time that the branch is computed.
        self.change = float(self.change)
        # An error that grows in proportion to the distance adds its square, up to a factor, to the latents.
        return self.change * (sigma - self.sigma) ** 2 > tolerance


class HeldBranches:
    """
    The branches of one image's guidance between the steps at which they are computed (docs/guidance.md).

    In between, the difference from the full velocity is held, for as long as this changes the latents by no more than about
    the tolerance, by how fast the difference changed when it was last computed.
    """

    def __init__(self) -> None:
        self._held: dict[str, HeldBranch] = {}
        self._sigma = 0.0

    def due(self, guidance: BagelGuidance, branches: dict[str, int], sigma: torch.Tensor) -> set[int]:
        """Of the branches that a step joins, those that it computes."""
        if guidance.tolerance is None:
            return set(branches.values())
        self._sigma, tolerance = float(sigma), guidance.tolerance
        return {
            branch
            for name, branch in branches.items()
            if name not in self._held or self._held[name].is_due(self._sigma, tolerance)
        }

    def completed(self, velocities: dict[str, torch.Tensor], branches: Iterable[str]) -> dict[str, torch.Tensor]:
        """Velocities with those of the branches that were not computed."""
        missing = [name for name in branches if name not in velocities]
        return velocities | {name: velocities["full"].float() - self._held[name].difference for name in missing}

    def update(self, guidance: BagelGuidance, velocities: dict[str, torch.Tensor]) -> None:
        """Take in what a step has computed."""
        if guidance.tolerance is None:
            return
        full = velocities["full"].float()
        for name in velocities.keys() - {"full"}:
            new, old = HeldBranch(full - velocities[name].float(), self._sigma), self._held.get(name)
            if old is not None and old.sigma != new.sigma:
                moved = torch.linalg.vector_norm(new.difference - old.difference) / torch.linalg.vector_norm(full)
                new.change = guidance.weight(name) * moved / abs(new.sigma - old.sigma)
            elif old is not None:
                new.change = old.change
            self._held[name] = new


TEXT_TO_IMAGE = BagelGuidance(4.0, 1.0, (0.4, 1.0), "global", 0.0)
EDITING = BagelGuidance(4.0, 2.0, (0.0, 1.0), "text_channel", 0.0)
