# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Contexts of the prompts of a call: those that guidance compares, of which what is the same is read once (docs/guidance.md)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from transformers_bagel.segments import EncodedSegment, without_images, without_last_text

from .contexts import FORWARD_COST, BagelContext, ContextReader
from .guidance import BagelGuidance


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
    keys = [tuple(map(id, segments)) for segments in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    sharers = Counter(key[:count] for key in distinct for count in range(1, len(key) + 1))

    def pays(beginning: tuple[int, ...], segments: Sequence[EncodedSegment]) -> bool:
        return (sharers[beginning] - 1) * sum(map(len, segments[: len(beginning)])) > FORWARD_COST

    lengths = {
        key: next((count for count in range(len(key), 0, -1) if pays(key[:count], segments)), 0)
        for key, segments in distinct.items()
    }
    begun: dict[tuple[int, ...], BagelContext] = {(): BagelContext()}
    # Beginnings may have one of their own in common, but the longest prompt is none, so that this ends.
    if common := {key[:count]: distinct[key][:count] for key, count in lengths.items() if count}:
        begun |= dict(zip(common, read_once(reader, list(common.values())), strict=True))
    contexts = reader.read(
        [begun[key[:count]] for key, count in lengths.items()],
        [distinct[key][count:] for key, count in lengths.items()],
    )
    read = dict(zip(distinct, contexts, strict=True))
    return [read[key] for key in keys]


def guidance_contexts(
    reader: ContextReader,
    prompts: Sequence[Sequence[EncodedSegment]],
    full: Sequence[BagelContext],
    guidance: Sequence[BagelGuidance],
    plan_in_no_image: bool = False,
    empty_no_text: bool = False,
) -> list[dict[str, BagelContext]]:
    """
    The contexts that guidance compares (original behaviour, points 14-16).

    `full` is everything; `no_text` the same before the last text of the prompt, unless an image follows it; `no_image`
    all texts but the plan. A context that equals `full` is the same object, and its velocity is not computed twice.

    Args:
        reader (`ContextReader`): Reads the texts of `no_image`.
        prompts (`Sequence[Sequence[EncodedSegment]]`): What each image is drawn from, without the plan.
        full (`Sequence[BagelContext]`): The context of each prompt and its plan.
        guidance (`Sequence[BagelGuidance]`): By which scales of at most 1 need no context.
        plan_in_no_image, empty_no_text: As in the pipeline's `__call__`.
    """
    told = [context.segments for context in full] if plan_in_no_image else prompts
    texts = [without_images(segments) for segments in told]
    compared = [
        index
        for index, settings in enumerate(guidance)
        if settings.text_scale > 1 and settings.image_scale > 1 and len(texts[index]) < len(full[index].segments)
    ]
    no_image = dict(zip(compared, read_once(reader, [texts[index] for index in compared]), strict=True))
    contexts = []
    for index, (prompt, context, settings) in enumerate(zip(prompts, full, guidance, strict=True)):
        branches = {"full": context}
        if settings.text_scale > 1:
            kept = 0 if empty_no_text else len(without_last_text(prompt))
            branches["no_text"] = context if kept == len(context.segments) else context.first(kept)
            branches["no_image"] = no_image.get(index, context)
        contexts.append(branches)
    return contexts
