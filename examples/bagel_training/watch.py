# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What is not finite: steps that are left out, and weights that are not saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from transformers_bagel.checkpoints import is_finite
from transformers_bagel.errors import some


logger = get_logger(__name__)

REMEDY = (
    "Go on from a checkpoint (--resume_from_checkpoint) with a lower --learning_rate, a longer --lr_warmup_steps or "
    "another --mixed_precision, or look at the samples."
)


class StepWatch:
    """
    Counts the steps that were left out since their loss or gradient was not finite.

    Args:
        limit (`int`): How many of them may follow each other before the training ends.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.num_steps = 0
        self.num_in_a_row = 0
        self.seconds = 0.0

    def good(self) -> None:
        """A step had an update."""
        self.num_in_a_row = 0

    def bad(self, step: int, logs: dict[str, float], names: list[str], seconds: float) -> None:
        """
        Warn of a step that had none.

        Args:
            step (`int`): Its number.
            logs (`dict[str, float]`): Its metrics.
            names (`list[str]`): This rank's samples in it.
            seconds (`float`): What it took.

        Raises:
            FloatingPointError: if it is one too many in a row.
        """
        self.num_steps += 1
        self.num_in_a_row += 1
        self.seconds += seconds
        what = f"loss {logs['loss']:.4g}, gradient norm {logs['grad_norm']:.4g}, with {some(gather_object(names), 16)}"
        if self.num_in_a_row > self.limit:
            raise FloatingPointError(
                f"Step {step} was not finite ({what}), nor were the {self.limit} before it "
                f"(--max_nonfinite_steps). {REMEDY}"
            )
        logger.warning(f"Left out step {step}, which was not finite: {what}")

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "num_in_a_row": self.num_in_a_row, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def check_finite(state: Any, what: str) -> None:
    """
    Refuse weights and whatever belongs to them, on all ranks alike, if any rank holds a value that is not finite.

    Args:
        state (`Any`): Tensors in dicts and lists.
        what (`str`): Start of the message: what is not to be.

    Raises:
        FloatingPointError: naming the tensors.
    """
    broken = sorted(
        set(gather_object([name for name, tensor in _tensors(state, "") if not is_finite(_local(tensor))]))
    )
    if broken:
        raise FloatingPointError(
            f"{what}: {some(broken)} {'holds' if len(broken) == 1 else 'hold'} NaN or infinity. {REMEDY}"
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _tensors(state: Any, place: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield place, state
    elif isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _tensors(value, f"{place}.{key}" if place else str(key))
