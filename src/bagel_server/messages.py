# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Messages of requests as turns of a session, checked part by part; images are read last, when all else is known to be right."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers_bagel.recalling import Turn, turns_of
from transformers_bagel.segments import IMAGE_TYPES, ROLES, TEXT_TYPES

from .errors import ApiError
from .images import content_at, image_of
from .settings import ServerSettings


# What a message may also have, which is not read: names of speakers, and what the client's own objects of answers hold.
_UNREAD = ("name", "id", "type", "status", "phase", "refusal", "annotations", "audio", "function_call", "tool_calls")
# LiteLLM's objects keep in `provider_specific_fields` what OpenAI's answers do not have, of which `parts` is read.
_READ = ("role", "content", "reasoning_content", "images", "parts", "provider_specific_fields")


class Reader:
    """
    Reads the messages of one request, and counts what they hold.

    Args:
        settings ([`ServerSettings`])
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self._characters = 0
        self._images: list[tuple[dict[str, Any], str | bytes, str]] = []

    def turns(self, messages: Any, param: str = "messages") -> list[Turn]:
        """
        The turns of messages in the format of chat completions. Thoughts alone belong to the words of the next message.

        Raises:
            ApiError: naming the field that is wrong.
        """
        if not isinstance(messages, list) or not messages:
            raise ApiError(f"`{param}` must be a list of at least one message.", param, code="invalid_value")
        if len(messages) > self.settings.max_messages:
            raise ApiError(
                f"`{param}` holds {len(messages)} messages, and at most {self.settings.max_messages} are read.", param
            )
        read = [self._message(message, f"{param}[{place}]") for place, message in enumerate(messages)]
        self.load()
        return turns_of(_with_thoughts(read))

    def text(self, value: Any, param: str) -> dict[str, Any]:
        """
        A text as a part of a message.

        Raises:
            ApiError: if it is none, or more than the server reads.
        """
        if not isinstance(value, str):
            raise _wrong(param, "a text")
        self._characters += len(value)
        if self._characters > self.settings.max_characters:
            raise ApiError(
                f"`{param}`: the texts of the request have more than {self.settings.max_characters} characters.",
                param,
                code="text_too_long",
            )
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ApiError(f"`{param}` holds half a character, which is no Unicode.", param, code="invalid_value")
        return {"type": "text", "text": value}

    def image(self, source: Any, param: str) -> dict[str, Any]:
        """
        An image, by its URL or the bytes of its file, as a part that [`load`] fills.

        Raises:
            ApiError: if it is none, or one too many.
        """
        if not isinstance(source, (str, bytes)):
            raise _wrong(param, "a URL")
        part: dict[str, Any] = {"type": "image", "image": None}
        self._images.append((part, source, param))
        if len(self._images) > self.settings.max_images:
            raise ApiError(
                f"`{param}`: the request holds more than {self.settings.max_images} images.",
                param,
                code="too_many_images",
            )
        return part

    def load(self) -> None:
        """
        Read all images, in the time in which a request must have arrived.

        Raises:
            ApiError: naming the field of the first that cannot be read.
        """
        deadline = time.monotonic() + self.settings.body_timeout
        left = self.settings.max_pixels
        for part, source, param in self._images:
            if isinstance(source, str):
                source = content_at(source, param, self.settings, deadline - time.monotonic())
            part["image"] = image = image_of(source, param, self.settings, left)
            left -= image.width * image.height

    def _message(self, message: Any, param: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise _wrong(param, "an object")
        role = message.get("role")
        if role not in ROLES or role == "tool":
            raise _wrong(f"{param}.role", "one of " + ", ".join(name for name in ROLES if name != "tool"))
        if (unknown := next((key for key in message if key not in (*_READ, *_UNREAD)), None)) is not None:
            raise ApiError(
                f"Unrecognized request argument supplied: {param}.{unknown[:64]}", f"{param}.{unknown[:64]}"
            )
        if message.get("tool_calls") or message.get("function_call") or message.get("audio"):
            raise ApiError(f"`{param}`: tools and audio are not supported.", param, code="unsupported_value")
        if role != "assistant":
            content = message.get("content")
            if content is None:
                raise _wrong(f"{param}.content", "a text or a list of parts")
            return {"role": "user", "content": list(self.parts(content, f"{param}.content"))}
        return {"role": "assistant", "content": self._answer(message, param)}

    def _answer(self, message: dict[str, Any], param: str) -> list[dict[str, Any]]:
        """The parts of an answer as the model wrote it: this server's own, or put together from thoughts, words and pictures."""
        images = [
            self._image_part(part, f"{param}.images[{place}]")
            for place, part in enumerate(_list(message.get("images"), f"{param}.images"))
        ]
        content = message.get("content")
        where = f"{param}.parts"
        if (given := message.get("parts")) is None and (kept := message.get("provider_specific_fields")) is not None:
            where = f"{param}.provider_specific_fields"
            if not isinstance(kept, dict):
                raise _wrong(where, "an object")
            given, where = kept.get("parts"), f"{where}.parts"
        parts = _list(given, where)
        if parts and isinstance(content, (str, type(None))):
            return [self._own_part(part, images, f"{where}[{place}]") for place, part in enumerate(parts)]
        spoken = [] if content is None else list(self.parts(content, f"{param}.content"))
        if (thoughts := message.get("reasoning_content")) is not None:
            thought = self.text(thoughts, f"{param}.reasoning_content")["text"]
            first = spoken.pop(0)["text"] if spoken and spoken[0]["type"] == "text" else ""
            spoken.insert(0, {"type": "text", "text": f"<think>{thought}</think>{first}"})
        return [*spoken, *images]

    def _own_part(self, part: Any, images: list[dict[str, Any]], param: str) -> dict[str, Any]:
        if isinstance(part, dict) and part.get("type") == "text":
            return self.text(part.get("text"), f"{param}.text")
        index = part.get("index") if isinstance(part, dict) and part.get("type") == "image" else None
        if not isinstance(index, int) or not 0 <= index < len(images):
            raise _wrong(param, "a text, or an image by its `index` in `images`")
        return images[index]

    def parts(self, content: Any, param: str) -> Iterator[dict[str, Any]]:
        """
        The parts of a message's content.

        Raises:
            ApiError: naming the part that is wrong.
        """
        if isinstance(content, str):
            if content:
                yield self.text(content, param)
            return
        if not isinstance(content, list):
            raise _wrong(param, "a text or a list of parts")
        for place, part in enumerate(content):
            where = f"{param}[{place}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in TEXT_TYPES:
                yield self.text(part.get("text"), f"{where}.text")
            elif kind in IMAGE_TYPES:
                yield self._image_part(part, where)
            else:
                raise _wrong(where, "a part of type text or image_url")

    def _image_part(self, part: Any, param: str) -> dict[str, Any]:
        image = part.get("image_url") if isinstance(part, dict) else None
        return self.image(image.get("url") if isinstance(image, dict) else image, f"{param}.image_url")


def _with_thoughts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages, of which thoughts alone were put before the words of the next one: the model wrote them as one text."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else message
        if last["role"] == message["role"] == "assistant" and joined and _is_thought(last["content"]):
            thought, (first, *rest) = joined.pop()["content"][0], message["content"] or [{"type": "text", "text": ""}]
            words = first["text"] if first["type"] == "text" else None
            text = {"type": "text", "text": thought["text"] + (words or "")}
            message = {"role": "assistant", "content": [text, *(rest if words is not None else [first, *rest])]}
        joined.append(message)
    return joined


def _is_thought(content: Sequence[dict[str, Any]]) -> bool:
    if [part["type"] for part in content] != ["text"]:
        return False
    return content[0]["text"].startswith("<think>") and content[0]["text"].endswith("</think>")


def _list(value: Any, param: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong(param, "a list")
    return value


def _wrong(param: str, wanted: str) -> ApiError:
    return ApiError(f"`{param}` must be {wanted}.", param, code="invalid_value")
