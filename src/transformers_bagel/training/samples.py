# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Samples between reading and packing: tokens, images to encode, noise; their seeds, and who shares a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch

from ..segments import EncodedSegment
from ..sequence import EncodedSequence


@dataclass(frozen=True)
class LatentImage:
    """An image to encode.

    Attributes:
        pixels (`torch.FloatTensor` of shape `(3, height, width)`): In [-1, 1].
        posterior_noise (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`, *optional*):
            What makes a sample of the posterior; without it the mean is taken.
    """

    pixels: torch.Tensor
    posterior_noise: torch.Tensor | None


@dataclass(frozen=True)
class LatentBlock:
    """A block of latents of a sample.

    Attributes:
        image (`int`): Which of the sample's `latent_images` it shows.
        grid (`tuple[int, int]`): Rows and columns of its tokens.
        timestep (`torch.FloatTensor` of shape `()`): Sigma of its noise; 0 for a condition.
        noise (`torch.FloatTensor` of shape `(latent_tokens, latent_dim)`): Zero for a condition.
    """

    image: int
    grid: tuple[int, int]
    timestep: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class EncodedSample(EncodedSequence):
    """A sample as tokens, with all its random choices made; only its latents are still pixels.

    Attributes:
        whole_length (`int`): Its tokens and those of what was dropped.
        whole_positions (`int`): Rope positions that it would take if no text had been dropped.
        patches (`list[torch.Tensor]`): `(patches, patch_dim)` of each image that the ViT sees.
        patch_grids (`list[tuple[int, int]]`): Rows and columns of these.
        latent_images (`list[LatentImage]`): Images to encode, each once.
        blocks (`list[LatentBlock]`): In the order of the sequence; several may show one image.
        latents (`list[torch.Tensor]`, *optional*): `(latent_tokens, latent_dim)` of each image, once it is encoded.
        name (`str`): For messages about it.
    """

    whole_length: int = 0
    whole_positions: int = 0
    patches: list[torch.Tensor] = field(default_factory=list)
    patch_grids: list[tuple[int, int]] = field(default_factory=list)
    latent_images: list[LatentImage] = field(default_factory=list)
    blocks: list[LatentBlock] = field(default_factory=list)
    latents: list[torch.Tensor] | None = None
    name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out, and why."""

    name: str
    reason: str


def without_next_action(encoded: EncodedSegment) -> EncodedSegment:
    """The segment, from which it is not learned what follows it."""
    return replace(encoded, segment=replace(encoded.segment, then=None))


def with_next_actions(
    sequence: EncodedSequence, segments: Sequence[EncodedSegment], end: EncodedSegment
) -> EncodedSequence:
    """The sequence of some segments, whose labels also say what follows those with `then`: the next one, or the end."""
    labels, start = sequence.labels.clone(), 0
    for before, following in pairwise(segments):
        start += len(before)
        if before.segment.then is not None:
            labels[start] = (following if before.segment.then == "next" else end).token_ids[0]
    return replace(sequence, labels=labels)


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers; two tuples do not share one by a simple sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 2)


def fill_rows(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Which samples stand in which sequence: each in the first one with space for it, in order.

    Args:
        lengths (`Sequence[int]`): Tokens of each sample.
        max_tokens (`int`, *optional*): Longest sequence; without it there is one.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        row = next((row for row, space in enumerate(free) if length <= space), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max_tokens)
        rows[row].append(index)
        free[row] -= length
    return rows
