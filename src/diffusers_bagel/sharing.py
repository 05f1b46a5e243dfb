# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the prompts of a call have in common is encoded and read once (docs/guidance.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from transformers_bagel.segments import EncodedSegment

from .contexts import FORWARD_COST, BagelContext, ContextReader


def share_segments(prompts: Sequence[Sequence[EncodedSegment]]) -> list[list[EncodedSegment]]:
    """The same prompts, in which segments of the same tokens and pixels are one object, as contexts compare them."""
    if len(prompts) == 1:
        return [list(prompts[0])]
    found: dict[Any, EncodedSegment] = {}
    return [[found.setdefault(_content(segment), segment) for segment in segments] for segments in prompts]


def _content(segment: EncodedSegment) -> tuple[Any, ...]:
    pixels = None
    if segment.pixels is not None:
        values = segment.pixels.contiguous().view(torch.uint8).numpy()
        pixels = (tuple(segment.pixels.shape), hashlib.sha256(values).digest())
    return segment.segment.type, segment.grid, tuple(segment.token_ids.tolist()), pixels


def read_once(reader: ContextReader, prompts: Sequence[Sequence[EncodedSegment]]) -> list[BagelContext]:
    """
    The context of each prompt, the same object for those that are the same. What several begin with is read once, where
    that spares more tokens than a forward of its own costs.

    Args:
        reader (`ContextReader`)
        prompts (`Sequence[Sequence[EncodedSegment]]`): Segments that are the same must be one object.
    """
    distinct = {_identity(segments): segments for segments in prompts}
    beginnings = {key: _beginning(segments, list(distinct.values())) for key, segments in distinct.items()}
    begun: dict[tuple[int, ...], BagelContext] = {(): BagelContext()}
    if common := {_identity(segments): segments for segments in beginnings.values() if segments}:
        begun |= dict(zip(common, read_once(reader, list(common.values())), strict=True))
    contexts = reader.read(
        [begun[_identity(beginnings[key])] for key in distinct],
        [segments[len(beginnings[key]) :] for key, segments in distinct.items()],
    )
    read = dict(zip(distinct, contexts, strict=True))
    return [read[_identity(segments)] for segments in prompts]


def _identity(segments: Sequence[EncodedSegment]) -> tuple[int, ...]:
    return tuple(map(id, segments))


def _beginning(
    segments: Sequence[EncodedSegment], prompts: Sequence[Sequence[EncodedSegment]]
) -> Sequence[EncodedSegment]:
    """The longest beginning that pays to be read once for all prompts that have it."""
    key = _identity(segments)
    for count in range(len(segments), 0, -1):
        sharers = sum(_identity(other[:count]) == key[:count] for other in prompts)
        if (sharers - 1) * sum(map(len, segments[:count])) > FORWARD_COST:
            return segments[:count]
    return segments[:0]
