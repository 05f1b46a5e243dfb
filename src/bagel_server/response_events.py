# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The events of a response, by OpenAI's names. What is not streamed is the response of the last of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from .generation import Answers, Choice, Piece, Usage
from .images import in_base64


_KINDS = {"thought": "reasoning", "text": "message"}


class ResponseEvents:
    """
    Makes events of the pieces of an answer: of its texts, thoughts and pictures, each an item.

    Args:
        answers ([`Answers`]): With one choice.
        model (`str`)
        about (`Mapping[str, Any]`): What the response says again of the request.
    """

    def __init__(self, answers: Answers, model: str, about: Mapping[str, Any]):
        self.answers = answers
        self._output_format = answers.asked.output_format
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": answers.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": False,
            "store": False,
            "seed": answers.seed,
            "usage": None,
            **about,
        }
        self._number = -1
        # The item that is not whole, and of which part of the answer it is.
        self._item: dict[str, Any] | None = None
        self._place: tuple[str, int] | None = None
        self._previews = 0

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """All events; the last has the whole response.

        Raises:
            ApiError: the error by which the answer ended.
        """
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response | {"output": []})
        async with aclosing(self.answers.pieces()) as pieces:
            async for choice, piece in pieces:
                for event in self._ended(choice) if piece.type == "end" else self._grown(piece):
                    yield event

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **content}

    def _of_item(self, kind: str, **content: Any) -> dict[str, Any]:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self._response["output"]), **content)

    def _grown(self, piece: Piece) -> Iterator[dict[str, Any]]:
        kind = _KINDS.get(piece.type, "image_generation_call")
        if self._place != (kind, piece.part):
            yield from self._closed("completed")
            self._place = (kind, piece.part)
            yield from self._opened(kind)
        assert self._item is not None
        if kind == "image_generation_call":
            yield from self._pictured(piece)
            return
        self._item["content"][0]["text"] += piece.text
        if kind == "message":
            yield self._of_item("response.output_text.delta", content_index=0, delta=piece.text, logprobs=[])
        else:
            yield self._of_item("response.reasoning_text.delta", content_index=0, delta=piece.text)

    def _opened(self, kind: str) -> Iterator[dict[str, Any]]:
        prefix = {"message": "msg", "reasoning": "rs", "image_generation_call": "ig"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        own: dict[str, dict[str, Any]] = {
            "message": {"role": "assistant", "content": []},
            "reasoning": {"summary": [], "content": []},
            "image_generation_call": {"result": None},
        }
        item |= own[kind]
        self._item, self._previews = item, 0
        yield self._event(
            "response.output_item.added", output_index=len(self._response["output"]), item=item | _empty(item)
        )
        if kind == "image_generation_call":
            yield self._of_item("response.image_generation_call.in_progress")
            return
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._of_item("response.content_part.added", content_index=0, part=part)
        self._item["content"] = [dict(part)]

    def _pictured(self, piece: Piece) -> Iterator[dict[str, Any]]:
        assert self._item is not None
        if piece.type == "progress":
            # How far it is, which OpenAI's own event leaves out.
            yield self._of_item("response.image_generation_call.generating", step=piece.step, steps=piece.steps)
            return
        assert piece.image is not None
        shown = {"size": f"{piece.image.width}x{piece.image.height}", "output_format": self._output_format}
        shown |= {"background": "opaque", "quality": "high"}
        if piece.type == "preview":
            yield self._of_item(
                "response.image_generation_call.partial_image",
                partial_image_index=self._previews,
                partial_image_b64=in_base64(piece.content),
                **shown,
            )
            self._previews += 1
        else:
            self._item |= {"result": in_base64(piece.content), **shown}

    def _closed(self, status: str) -> Iterator[dict[str, Any]]:
        """The item that was begun is whole."""
        item = self._item
        if item is None:
            return
        if item["type"] == "image_generation_call":
            yield self._of_item("response.image_generation_call.completed")
        else:
            part = item["content"][0]
            if item["type"] == "message":
                yield self._of_item("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            else:
                yield self._of_item("response.reasoning_text.done", content_index=0, text=part["text"])
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._response["output"]), item=item)
        self._response["output"].append(item)
        self._item = None

    def _ended(self, choice: Choice) -> Iterator[dict[str, Any]]:
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        yield from self._closed(status)
        self._response |= {"status": status, "completed_at": int(time.time()), "usage": usage_of(choice.usage)}
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._event(f"response.{status}", response=self._response)


def _empty(item: dict[str, Any]) -> dict[str, Any]:
    return {"content": []} if "content" in item else {}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's words; those of pictures count as written."""
    written = usage.text + usage.image
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": usage.thoughts, "image_tokens": usage.image},
        "total_tokens": usage.prompt + written,
    }
