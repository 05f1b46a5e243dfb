# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Numbers as numpy and torch hand them out: what sweeps, schedules and tensors' own methods give is as good as Python's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def plain_number(value: Any) -> Any:
    """A number of numpy or torch, also one in an array or tensor without axes, as Python's; anything else as it is."""
    is_foreign = isinstance(value, (np.generic, np.ndarray, torch.Tensor))
    return value.item() if is_foreign and value.ndim == 0 else value


def plain_numbers(values: Any) -> Any:
    """[`plain_number`], also of what a list, a tuple or a dict holds."""
    if isinstance(values, dict):
        return {name: plain_number(value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(map(plain_number, values))
    return plain_number(values)
