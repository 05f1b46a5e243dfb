# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Which rows of a call share a forward, and how: padding of their tokens, caches that are joined and parted."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from transformers_bagel import fork_cache


# What a forward of text costs whatever its length, in tokens: 8.6 of 0.25 ms on two CPU cores at the middle width of
# benchmarks/models.py, 95 of 2.6 ms in a layer of the published width. More padding than this costs more than a forward.
FORWARD_COST = 32
# Tokens, padding included, of a forward of several texts. It is then 3 % faster than the same tokens one by one.
MAX_PREFILL_TOKENS = 1024
# Tokens, padding and plans included, that decode together. Their keys and values take 1.9 GB of the published model in
# bfloat16, an eighth of the weights that each step reads.
MAX_PLAN_TOKENS = 32768

# Latent tokens of a denoising forward of several images or branches. On a CPU larger ones leave its caches: images of 256
# pixels are drawn fastest four a forward, eight take 1.13 of the time an image; the two branches of one of 512 pixels take
# 1.08 together of what they take apart, those of 384 pixels 0.95 (middle width, two cores). Elsewhere memory sets the bound:
# its activations take some 5 GB in the published model in bfloat16.
MAX_STEP_TOKENS_CPU = 1536
MAX_STEP_TOKENS = 32768


def runs_of(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Rows in their order, cut into runs of at most `max_tokens`, without padding; a longer row runs alone.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        max_tokens (`int`): Of a run of several rows.

    Returns:
        `list[list[int]]`: Indices of the rows of each run.
    """
    runs: list[list[int]] = []
    total = 0
    for index, length in enumerate(lengths):
        total += length
        if runs and total <= max_tokens:
            runs[-1].append(index)
        else:
            runs.append([index])
            total = length
    return runs


def batches_of(lengths: Sequence[int], max_tokens: int, max_padding: float = float("inf")) -> list[list[int]]:
    """
    Rows that run together, from the shortest to the longest.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        max_tokens (`int`): Of a batch of several rows, padding included.
        max_padding (`float`, *optional*): How much padding a row may bring to the batch that it joins.

    Returns:
        `list[list[int]]`: Indices of the rows of each batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        rows = len(batches[-1]) if batches else 0
        padding = rows * (lengths[index] - longest)
        longest = lengths[index]
        if rows and (rows + 1) * longest <= max_tokens and padding <= max_padding:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_rows(rows: Sequence[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Rows `(1, tokens)` of any lengths as one tensor `(rows, longest)`. A single row is not copied."""
    if len(rows) == 1:
        return rows[0]
    longest = max(row.shape[1] for row in rows)
    missing = [longest - row.shape[1] for row in rows]
    padding = [(count, 0) if side == "left" else (0, count) for count in missing]
    pad = torch.nn.functional.pad
    return torch.cat([pad(row, places, value=value) for row, places in zip(rows, padding, strict=True)])


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """
    One cache of the rows of several, padded on the left with zeros, that grows on its own.

    Args:
        caches (`Sequence[DynamicCache]`): Of one row each. A single one is not copied.
    """
    joined = fork_cache(caches[0])
    if len(caches) == 1:
        return joined
    longest = max(cache.get_seq_length() for cache in caches)
    for layer, *of_rows in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            states = [getattr(row, name) for row in of_rows]
            together = states[0].new_zeros(len(states), states[0].shape[1], longest, states[0].shape[3])
            for row, tokens in enumerate(states):
                together[row, :, longest - tokens.shape[2] :] = tokens[0]
            setattr(layer, name, together)
    return joined


def split_cache(cache: DynamicCache, starts: Sequence[int], lengths: Sequence[int]) -> list[DynamicCache]:
    """A cache of each row, without its padding. No tensor is copied.

    Args:
        cache (`DynamicCache`): Of `len(lengths)` rows.
        starts (`Sequence[int]`): First token of each row that is not padding.
        lengths (`Sequence[int]`): Tokens of each row.
    """
    rows = []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = fork_cache(cache)
        for layer in own.layers:
            layer.keys = layer.keys[row : row + 1, :, start : start + length]
            layer.values = layer.values[row : row + 1, :, start : start + length]
        rows.append(own)
    return rows
