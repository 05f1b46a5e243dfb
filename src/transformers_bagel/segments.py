# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""From a training sample to its segments: what conditions, what is learned, what may be dropped.

Sources: published behaviour, points 1-3, 8, 31 and 33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .processing_bagel import IMAGE_KEYS, check_conversation


SEGMENT_TYPES = ("text", "vit_image", "vae_image")


@dataclass(frozen=True)
class Segment:
    """A part of a sequence.

    Attributes:
        type (`str`): `"text"`, `"vit_image"` (seen) or `"vae_image"` (latents).
        content (`Any`): The text, or the image as [`~image_processing_bagel.to_rgb`] takes it.
        loss (`bool`): Whether it is learned: a text token by token, latents from noise. Otherwise it is a condition.
        dropout (`bool`): Whether it may be dropped, so that the model learns to draw without it, as guidance needs.
    """

    type: str
    content: Any
    loss: bool = False
    dropout: bool = False


def sample_segments(sample: Mapping[str, Any]) -> list[Segment]:
    """
    Segments of a training sample.

    Args:
        sample (`Mapping`):
            Either `{"messages": [...]}`, a conversation in chat format, or `{"segments": [...]}`, the same spelled out
            as `{"type": "text" | "vit_image" | "vae_image", "text" | "image": ..., "loss": bool, "dropout": bool}`.

            In a conversation the assistant's texts and images are learned and all else conditions. An assistant's
            image that is followed by anything is given back clean. If the assistant draws, every condition is given
            as latents and as ViT tokens; else the ViT tokens suffice. Image parts may leave out the image: a column
            `images` then holds them in order. A part may override what follows from its place: `loss`, `dropout`, and
            for an image `vae` and `vit`, whether it conditions as latents and as ViT tokens.

    Raises:
        TypeError, ValueError: if the sample is no such thing, or has nothing to learn.
    """
    if not isinstance(sample, Mapping):
        raise TypeError(f"A sample must be a dict with `messages` or `segments`, got a `{type(sample).__name__}`.")
    given = [name for name in ("messages", "segments") if sample.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"A sample must have either `messages` or `segments`, got the keys {sorted(sample)}.")
    segments = _from_messages(sample) if given == ["messages"] else _from_spelled_out(sample["segments"])
    if not any(segment.loss for segment in segments):
        raise ValueError(
            "The sample has no target: no text or image of the assistant, and no part with `loss`. There is nothing "
            "to learn from it."
        )
    return segments


def _from_spelled_out(parts: Any) -> list[Segment]:
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise TypeError(f"`segments` must be a list of dicts, got {parts!r}.")
    segments = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in SEGMENT_TYPES:
            raise ValueError(f"`segments` holds {part!r}; its `type` must be one of {', '.join(SEGMENT_TYPES)}.")
        content = part.get("text" if kind == "text" else "image")
        if content is None or (kind == "text" and not isinstance(content, str)):
            raise ValueError(
                f"`segments` holds a {kind} without its {'text' if kind == 'text' else 'image'}: {part!r}."
            )
        if kind == "vit_image" and part.get("loss"):
            raise ValueError("`segments` holds a vit_image with `loss`: only texts and latents are learned.")
        segments.append(Segment(kind, content, loss=bool(part.get("loss"))))
    return _with_dropout(segments, [part.get("dropout") for part in parts])


def _from_messages(sample: Mapping[str, Any]) -> list[Segment]:
    messages = _with_images(sample["messages"], sample.get("images"))
    check_conversation(messages, "messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise TypeError("`messages` of a sample must be one conversation, a list of messages, got a list of lists.")
    parts = [(message["role"], part) for message in messages for part in _parts(message)]
    learned = [_choice(part, "loss", role == "assistant") for role, part in parts]
    draws = any(loss and part["type"] != "text" for loss, (_, part) in zip(learned, parts, strict=True))
    segments: list[Segment] = []
    dropout: list[bool | None] = []
    for index, (loss, (_, part)) in enumerate(zip(learned, parts, strict=True)):
        if part["type"] == "text":
            new = [Segment("text", part["text"], loss=loss)]
        else:
            image = next(part[key] for key in IMAGE_KEYS if part.get(key) is not None)
            conditions = not loss or index < len(parts) - 1
            new = [Segment("vae_image", image, loss=True)] if loss else []
            if conditions and _choice(part, "vae", draws):
                new.append(Segment("vae_image", image))
            if conditions and _choice(part, "vit", True):
                new.append(Segment("vit_image", image))
        segments += new
        dropout += [part.get("dropout")] * len(new)
    return _with_dropout(segments, dropout)


def _with_dropout(segments: list[Segment], choices: Sequence[bool | None]) -> list[Segment]:
    """By default what conditions a drawing may be dropped: guidance compares drawings with and without it."""
    last_drawing = max(
        (i for i, segment in enumerate(segments) if segment.type == "vae_image" and segment.loss), default=-1
    )
    return [
        replace(segment, dropout=not segment.loss and (index < last_drawing if choice is None else bool(choice)))
        for index, (segment, choice) in enumerate(zip(segments, choices, strict=True))
    ]


def _with_images(messages: Any, images: Any) -> Any:
    """Messages whose empty image parts got the images of the sample's own column."""
    if images is None or not isinstance(messages, Sequence):
        return messages
    rest = list(images) if isinstance(images, (list, tuple)) else [images]
    count = len(rest)
    filled = []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), Sequence):
            parts = [dict(part) if isinstance(part, Mapping) else part for part in _parts(message)]
            for part in parts:
                is_empty = isinstance(part, dict) and part.get("type") == "image"
                if is_empty and all(part.get(key) is None for key in IMAGE_KEYS):
                    if not rest:
                        raise ValueError(f"`images` holds {count} images, fewer than `messages` refer to.")
                    part["image"] = rest.pop(0)
            message = {**message, "content": parts}
        filled.append(message)
    if rest:
        raise ValueError(f"`images` holds {count} images, {len(rest)} more than `messages` refer to.")
    return filled


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _choice(part: Mapping[str, Any], name: str, default: bool) -> bool:
    """An override, if the part has one; tables store an absent one as `None`."""
    value = part.get(name)
    return default if value is None else bool(value)


__all__ = ["Segment", "sample_segments"]
