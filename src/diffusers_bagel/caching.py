# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""TaylorSeer: on most steps, predict the last layer's output from its own past instead of computing it.

Every layer but the last is computed in vain on a skipped step, so only the last one's expansion is kept; and it is
kept here, per guidance branch and call, never in the model. Source: original behaviour, point 30.
"""

from dataclasses import dataclass, field
from math import factorial

import torch

from .inputs import check_whole_number


@dataclass(frozen=True)
class TaylorSeerConfig:
    """
    Settings of TaylorSeer.

    Args:
        interval (`int`): After the warm-up, one step in `interval` is computed.
        warmup_steps (`int`): First steps, which are all computed.
        max_order (`int`): Highest order of the expansion.
    """

    interval: int = 3
    warmup_steps: int = 5
    max_order: int = 6

    def __post_init__(self) -> None:
        check_whole_number("interval", self.interval, 1)
        check_whole_number("warmup_steps", self.warmup_steps, 1)
        check_whole_number("max_order", self.max_order, 0)


@dataclass
class TaylorSeerState:
    """The expansion of one guidance branch, which counts only the steps that this branch takes."""

    config: TaylorSeerConfig
    step: int = -1
    computed_step: int = 0
    derivatives: list[torch.Tensor] = field(default_factory=list)

    def advance(self) -> bool:
        """Go on to the next step; returns whether it is to be computed."""
        self.step += 1
        last_warmup = self.config.warmup_steps - 1
        return self.step <= last_warmup or (self.step - last_warmup) % self.config.interval == 0

    def update(self, features: torch.Tensor) -> None:
        """Take in the last layer's output `(tokens, hidden)` of a computed step."""
        derivatives = [features]
        # Differences begin with the last step of the warm-up.
        if self.step >= self.config.warmup_steps - 1:
            for previous in self.derivatives[: self.config.max_order]:
                derivatives.append((derivatives[-1] - previous) / (self.step - self.computed_step))
        self.derivatives, self.computed_step = derivatives, self.step

    def predict(self) -> torch.Tensor:
        """The last layer's output `(tokens, hidden)` at a skipped step."""
        distance = self.step - self.computed_step
        terms = [term * (distance**order / factorial(order)) for order, term in enumerate(self.derivatives)]
        return torch.stack(terms).sum(0)
