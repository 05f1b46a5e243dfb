# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` whose steps have the loss of one large batch, however they are cut into micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .losses import loss_totals, over_ranks


class BagelTrainer(Trainer):
    """
    [`Trainer`] for batches of [`BagelDataCollator`].

    BAGEL has two losses with a count of targets each, and a micro-batch may have none of one kind. `Trainer` counts one
    kind, or takes the mean of the micro-batches' means; this takes both means over the targets of the whole step.
    """

    loss_is_scaled_for_ga = True

    def _get_num_items_in_batch(self, batch_samples: Sequence[Any], device: torch.device) -> torch.Tensor | None:
        if not batch_samples:
            return None
        reduction = self.accelerator.unwrap_model(self.model).config.loss_reduction
        totals = torch.stack([loss_totals(batch, reduction) for batch in batch_samples]).sum(0)
        return over_ranks(totals.to(device))[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs, loss_totals=num_items_in_batch)
        # Data parallel takes the mean over the ranks, where the sum is meant.
        loss = self.accelerator.num_processes * outputs.loss
        return (loss, outputs) if return_outputs else loss


__all__ = ["BagelTrainer"]
