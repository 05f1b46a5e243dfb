# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Images as arrays and tensors: their range of values, and batches of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_bytes(values: np.ndarray) -> np.ndarray:
    """The values of an image, or of a batch of them, as bytes.

    Which of the ranges in use they have, they tell themselves; those that could be of two are refused.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if they are out of range.
    """
    if values.dtype.kind not in "buif":
        raise TypeError(f"`images` holds an array of {values.dtype}; pass numbers.")
    if not values.size:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    is_whole = values.dtype.kind in "ui"
    if low >= 0 and high <= 255 and (is_whole or high >= 2):
        return values.round().astype(np.uint8)
    if low >= 0 and high <= 1:
        return (values * 255).round().astype(np.uint8)
    if values.dtype == np.uint16:
        return (values / 257).round().astype(np.uint8)
    # Values that are barely negative come from resizing an image in [0, 1].
    if not is_whole and -1 <= low <= -0.25 and 0 < high <= 1:
        return ((values / 2 + 0.5) * 255).round().astype(np.uint8)
    raise ValueError(
        f"`images` holds an array with values from {low} to {high}; pass integers from 0 to 255, or numbers from 0 to 1, "
        "from 0 to 255 or from -1 to 1, cut off at these ends."
    )


def as_array(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """The numbers of an array or tensor in a type that NumPy has, which lacks bfloat16."""
    if not isinstance(images, torch.Tensor):
        return images
    is_short = images.is_floating_point() and images.itemsize < 4
    return (images.float() if is_short else images).detach().cpu().numpy()


def unbatched(images: Any) -> Any:
    """What holds several images as a list: also an array or tensor of four axes, whose images have one range of values."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if not isinstance(images, (np.ndarray, torch.Tensor)) or images.ndim != 4:
        return images
    pixels = as_bytes(as_array(images))
    return list(torch.from_numpy(pixels) if isinstance(images, torch.Tensor) else pixels)
