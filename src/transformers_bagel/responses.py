# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the model has said as a message: thoughts, words and pictures apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_parsing import parse_response

from .segments import END, IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER, SPECIAL_TOKENS, START, VISION_END, VISION_START


_MARKERS = "|".join(map(re.escape, (END, SPECIAL_TOKENS["pad_token_id"])))

# The `response_template` of transformers. Words are kept as they are: what comes as a stream is what comes as a whole. A thought
# that is cut off ends where the text does; what a batch is padded with is nobody's words.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": START,
    "fields": {
        "reasoning_content": {
            "open_pattern": r"\s*<think>",
            "close_pattern": rf"</think>\s*|{_MARKERS}",
            "repeats": True,
            "join": "\n",
        },
        "content": {
            "close_pattern": rf"{re.escape(START)}|(?:{_MARKERS})\s*",
            "content_args": {"strip": False},
            "repeats": True,
            "join": "",
        },
    },
}

# The latents of an image and what the ViT sees of it are one picture; a start alone asks for one.
_START, _END, _SEEN, _LATENT = map(re.escape, (VISION_START, VISION_END, IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER))
_PICTURE = re.compile(f"{_START}(?:(?:{_LATENT})+{_END}{_START}(?={_SEEN}))?(?:{_SEEN}|{_LATENT})*(?:{_END})?")


def without_end(text: str) -> str:
    """A text that was decoded with its special tokens, less those that end it and pad a batch."""
    return re.sub(rf"(?:{_MARKERS})+\Z", "", text)


def with_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """
    A parsed message, whose content becomes a list of parts in order if it holds the placeholders of pictures.

    Args:
        message (`dict`): As transformers' `parse_response` returns it.
    """
    content = message.get("content")
    if not isinstance(content, str) or VISION_START not in content:
        return message
    pieces = [{"type": "text", "text": text} for text in _PICTURE.split(content)]
    parts = [part for piece in pieces for part in (piece, {"type": "image"}) if part.get("text") != ""]
    return message | {"content": parts[:-1]}


def message_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    The message that the texts and pictures of an answer make.

    Args:
        parts (`Sequence[dict]`): Of type `"text"` or `"image"`, in order.

    Returns:
        `dict`: `role`; `reasoning_content`, if there are thoughts; and `content`, a text, or a list of parts if there are
        pictures.
    """
    content: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for part in parts:
        if part["type"] == "text":
            parsed = parse_response(part["text"], RESPONSE_TEMPLATE, prefix="")
            if "reasoning_content" in parsed:
                thoughts.append(parsed["reasoning_content"])
            part = part | {"text": parsed["content"]}
        if part.get("text") != "":
            content.append(part)
    message: dict[str, Any] = {"role": "assistant"}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if all(part["type"] == "text" for part in content):
        return message | {"content": "".join(part["text"] for part in content)}
    return message | {"content": content}
