# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""TaylorSeer: on most steps, predict the last layer's output from its own past instead of computing it.

Every layer but the last is computed in vain on a skipped step, so only the last one's expansion is kept; and it is
kept here, per guidance branch and call, never in the model. Source: original behaviour, point 30.
"""

from dataclasses import dataclass, field
from math import factorial

import torch
from diffusers.hooks import TaylorSeerCacheConfig

from transformers_bagel.errors import shown

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

    def is_computed(self, step: int) -> bool:
        """Whether a step is computed; the others are predicted."""
        last_warmup = self.warmup_steps - 1
        return step <= last_warmup or (step - last_warmup) % self.interval == 0

    @property
    def first_difference(self) -> int:
        """The step with which differences begin: the last one of the warm-up."""
        return self.warmup_steps - 1

    @property
    def dtype(self) -> torch.dtype | None:
        """What the expansion is kept in: the type of the features."""
        return None


@dataclass(frozen=True)
class TaylorSeerSchedule:
    """
    A `TaylorSeerCacheConfig` of diffusers as [`TaylorSeerState`] reads it: the steps that it computes are those of its hook.

    Args:
        interval, warmup_steps, max_order (`int`): `cache_interval`, `disable_cache_before_step`, `max_order`.
        end (`int`, *optional*): `disable_cache_after_step`, from which on all steps are computed.
        dtype (`torch.dtype`, *optional*): `taylor_factors_dtype`, what the expansion is kept in.
    """

    interval: int
    warmup_steps: int
    max_order: int
    end: int | None
    dtype: torch.dtype | None
    first_difference: int = 0

    @classmethod
    def of(cls, config: TaylorSeerCacheConfig) -> "TaylorSeerSchedule":
        """
        What a configuration says.

        Raises:
            TypeError, ValueError: if it cannot work, or names modules.
        """
        if config.skip_predict_identifiers is not None or config.cache_identifiers is not None:
            raise ValueError(
                "`skip_predict_identifiers` and `cache_identifiers`: only the last layer's output is ever used, and it alone is "
                "kept. Leave them out."
            )
        check_whole_number("cache_interval", config.cache_interval, 1)
        # There must be a step to predict from.
        check_whole_number("disable_cache_before_step", config.disable_cache_before_step, 1)
        check_whole_number("max_order", config.max_order, 0)
        end, dtype = config.disable_cache_after_step, config.taylor_factors_dtype
        if end is not None:
            check_whole_number("disable_cache_after_step", end, 0)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"`taylor_factors_dtype` must be a floating point `torch.dtype`, got {shown(dtype)}.")
        return cls(config.cache_interval, config.disable_cache_before_step, config.max_order, end, dtype)

    def is_computed(self, step: int) -> bool:
        """Whether a step is computed; the others are predicted."""
        is_due = (step - self.warmup_steps - 1) % self.interval == 0
        return step < self.warmup_steps or is_due or (self.end is not None and step >= self.end)


@dataclass
class TaylorSeerState:
    """The expansion of one guidance branch, which counts only the steps that this branch takes."""

    config: TaylorSeerConfig | TaylorSeerSchedule
    step: int = -1
    computed_step: int = 0
    derivatives: list[torch.Tensor] = field(default_factory=list)
    _dtype: torch.dtype = torch.float32

    def advance(self) -> bool:
        """Go on to the next step; returns whether it is to be computed."""
        self.step += 1
        return self.config.is_computed(self.step)

    def update(self, features: torch.Tensor) -> None:
        """Take in the last layer's output `(tokens, hidden)` of a computed step."""
        derivatives = [features]
        if self.step >= self.config.first_difference:
            for previous in self.derivatives[: self.config.max_order]:
                difference = derivatives[-1] - previous.to(features.dtype)
                derivatives.append(difference / (self.step - self.computed_step))
        dtype = self.config.dtype or features.dtype
        self.derivatives, self.computed_step = [term.to(dtype) for term in derivatives], self.step
        self._dtype = features.dtype

    def predict(self) -> torch.Tensor:
        """The last layer's output `(tokens, hidden)` at a skipped step."""
        distance = self.step - self.computed_step
        terms = [
            term.to(self._dtype) * (distance**order / factorial(order)) for order, term in enumerate(self.derivatives)
        ]
        return torch.stack(terms).sum(0)
