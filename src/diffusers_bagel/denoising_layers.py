# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The decoder layers as denoising steps go through them: where step caches of other libraries take hold."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from transformers_bagel.layers import run_in_turn


class DenoisingLayers(nn.Module):
    """
    The model's layers under the name of each branch of guidance, so that what replaces them keeps a state for each.

    Texts do not go through it. A cache that replaces these lists has one state for a pipeline, and so serves one drawing at a
    time.

    Args:
        layers (`Sequence[nn.Module]`): Of the language model.

    Attributes:
        full, no_text, no_image (`nn.ModuleList`): The same layers three times.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.full, self.no_text, self.no_image = (nn.ModuleList(layers) for _ in range(3))
        self._drawing: Callable[[], Any] = lambda: None

    @property
    def is_replaced(self) -> bool:
        """Whether somebody has put another `forward` in the place of this one's, as cache-dit does."""
        return getattr(self.forward, "__func__", None) is not DenoisingLayers.forward

    def are_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether they are these layers, each of them."""
        return len(self.full) == len(layers) and all(map(operator.is_, self.full, layers))

    def of_branch(self, name: str, drawing: object, is_first: bool) -> Callable[..., torch.Tensor]:
        """
        What leads through the layers at a step of one branch, as `run_layers` of [`BagelTextModel`].

        Args:
            name (`str`): Of the branch.
            drawing (`object`): Whose step it is.
            is_first (`bool`): Whether it begins with this step.

        Raises:
            RuntimeError: if another drawing has begun since.
        """
        if is_first:
            self._drawing = weakref.ref(drawing)
        elif self._drawing() is not drawing:
            raise RuntimeError(
                "Two pictures are drawn at the same time through `denoising_layers`, whose cache has one state: draw them one "
                "after the other, or use `enable_cache`."
            )
        return functools.partial(self._run, name)

    def _run(self, name: str, layers: Any, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        return self(name, hidden_states, **given)

    def forward(self, branch: str, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        """Hidden states behind all layers."""
        return run_in_turn(getattr(self, branch), hidden_states, **given)
