# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The average of the weights, on the CPU or sharded as the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor


class ShardedEma:
    """diffusers' `EMAModel` over each rank's own shards.

    Args:
        parameters (`list[nn.Parameter]`): What is trained, sharded or not.
        decay (`float`): Of the average.
        device (`torch.device`, *optional*): Where the average is kept; by default beside the weights.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, device: torch.device | None = None):
        self.parameters = parameters
        self.device = device
        self.average = EMAModel(self._shards(), decay=decay)

    def _shards(self) -> list[torch.Tensor]:
        """This rank's shards on the average's device; marked as trained, or `EMAModel` would not average them."""
        return [shard.to(self.device or shard.device).requires_grad_() for shard in self._weights()]

    def _weights(self) -> list[torch.Tensor]:
        return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in self.parameters]

    def step(self) -> None:
        """Take in the weights after an update."""
        self.average.step(self._shards())

    def copy_to_model(self) -> None:
        """Make the average the model's weights."""
        self.average.copy_to(self._weights())

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The average as the model's weights for a while."""
        self.average.store(self._weights())
        self.average.copy_to(self._weights())
        try:
            yield
        finally:
            self.average.restore(self._weights())

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved average, with this one's decay and device."""
        decay = self.average.decay
        self.average.load_state_dict(state)
        self.average.decay = decay
        if self.device is not None:
            self.average.to(self.device)
