# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Answers that are sent as they come: server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from .errors import ApiError
from .generation import Answers, gone_cancels


class Events(StreamingResponse):
    """
    A stream of events, which ends its answers when the client closes it.

    Args:
        request (`Request`)
        answers ([`Answers`])
        events (`AsyncGenerator[dict]`): What is sent. One with a `type` is an event of that name.
        are_named (`bool`, *optional*, defaults to `True`): Whether they have one; else `[DONE]` is behind the last.
    """

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, answers: Answers, events: AsyncGenerator[dict[str, Any], None], are_named: bool = True
    ):
        # Proxies would hold back what they collect.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_lines(request, answers, events, are_named), headers=headers)
        self.answers = answers

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.answers.cancel()


async def _lines(
    request: Request, answers: Answers, events: AsyncGenerator[dict[str, Any], None], are_named: bool
) -> AsyncIterator[str]:
    async with gone_cancels(request, answers):
        try:
            async with aclosing(events) as sent:
                async for event in sent:
                    yield line(event)
        except ApiError as error:
            yield line(error_event(error, are_named))
    if not are_named:
        yield "data: [DONE]\n\n"


def error_event(error: ApiError, are_named: bool) -> dict[str, Any]:
    """What a stream ends with that has begun and fails: what OpenAI's clients look for, and the event of its kind."""
    return error.body | (error.body["error"] | {"type": "error"} if are_named else {})


def line(event: dict[str, Any]) -> str:
    """An event as it is sent."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
