# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` whose steps have the loss of one large batch, however they are cut into micro-batches and ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .losses import loss_totals


class BagelTrainer(Trainer):
    """
    [`Trainer`] for batches of [`BagelDataCollator`], best with `return_layout=True`.

    BAGEL has two losses with a count of targets each, and a micro-batch may have none of one kind. `Trainer` counts one
    kind, or takes the mean of the micro-batches' means; this takes both means over the targets of the whole step.

    Of a streamed dataset each process reads its own share: packed batches cannot be cut for them.

    Raises:
        ValueError: for `label_smoothing_factor` and `compute_loss_func`, which would replace both losses, and for
            `dispatch_batches=True`, which would cut batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        if args is not None:
            args = copy.copy(args)
            args.accelerator_config = copy.copy(args.accelerator_config)
            if args.accelerator_config.dispatch_batches:
                raise ValueError(
                    "`dispatch_batches=True` would cut packed batches. Leave it out: each process reads its own."
                )
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, *others, **kwargs)
        for name, is_set in (
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("compute_loss_func", self.compute_loss_func is not None),
        ):
            if is_set:
                raise ValueError(f"`{name}` would replace the losses of text and velocity. Leave it out.")

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of a step, and the totals of all ranks, `(2,)`, see [`loss_totals`]."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        reduction = self.accelerator.unwrap_model(self.model).config.loss_reduction
        totals = torch.zeros(2, device=device)
        for batch in batches:
            totals += loss_totals(batch, reduction).to(device)
        # A rank without batches takes part, or the others would wait for it.
        return batches, self.accelerator.reduce(totals, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if num_items_in_batch is None:
            # An evaluation: the mean of its own batch.
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs, loss_totals=num_items_in_batch)
        # Data parallel takes the mean of the ranks' gradients, where the sum is meant.
        loss = self.accelerator.num_processes * outputs.loss
        return (loss, outputs) if return_outputs else loss


__all__ = ["BagelTrainer"]
