# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`/v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from .bodies import read_json
from .errors import ApiError
from .generation import Answers, Asked, Choice, Generation, Piece, Usage
from .images import data_url
from .messages import Reader
from .requests import Sampling, lengths, refuse
from .settings import ServerSettings
from .sse import Events


router = APIRouter()
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 200
_MODALITIES: dict[frozenset[str], str] = {
    frozenset(("text",)): "text",
    frozenset(("image",)): "image",
    frozenset(("text", "image")): "auto",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(Sampling):
    """The body of a request."""

    messages: list[Any]
    modalities: list[Literal["text", "image"]] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # Changes nothing here.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    # Only under the values of `_UNSUPPORTED`.
    audio: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    response_format: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@router.post("/v1/chat/completions")
async def complete(request: Request) -> Response:
    """Answer a conversation in texts and pictures."""
    generation: Generation = request.app.state.generation
    body = await read_json(request, ChatRequest, generation.settings)
    asked = await generation.read(asked_by, body)
    if not body.stream:
        async with generation.answers(request, asked) as answers:
            found = await answers.whole()
            return JSONResponse(_completion(answers, found, generation.settings.model))
    answers = await generation.begin(asked)
    options = body.stream_options or StreamOptions()
    return Events(
        request, answers, _chunks(answers, generation.settings.model, bool(options.include_usage)), are_named=False
    )


def asked_by(body: ChatRequest, settings: ServerSettings) -> Asked:
    """
    What a request asks for.

    Raises:
        ApiError: naming the field that is wrong.
    """
    body.check(settings)
    refuse(body, _UNSUPPORTED)
    output = _output(body.modalities)
    if body.stream_options is not None and not body.stream:
        raise ApiError("`stream_options` is for `stream` alone.", "stream_options")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError("`max_tokens` and `max_completion_tokens` were both given. Give one of them.", "max_tokens")
    longest = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    tokens = getattr(body, longest)
    chosen = body.drawing() | body.sampling()
    chosen |= lengths(settings, body.max_images, **{longest: tokens})
    if body.reasoning_effort is not None and body.think is None:
        chosen["think"] = body.reasoning_effort not in ("none", "minimal")
    stops = stops_of(body.stop)
    if body.stream and body.preview_every is not None:
        chosen["preview_every"] = body.preview_every
    return Asked(
        Reader(settings).turns(body.messages),
        body.output or output,
        chosen | ({"progress": True} if body.stream else {}),
        body.n or 1,
        body.seed,
        stops,
        body.output_format or "png",
        100 if body.output_compression is None else body.output_compression,
        names={"max_new_tokens": longest, "content": "messages", "images": "messages"}
        | ({"height": "size", "width": "size"} if body.size else {}),
    )


def _output(modalities: Sequence[str] | None) -> str:
    if modalities is None:
        return "text"
    if not modalities:
        raise ApiError("`modalities` is empty. Name `text`, `image`, or both.", "modalities")
    return _MODALITIES[frozenset(modalities)]


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """
    The words that cut a text off.

    Raises:
        ApiError: if they are too many, too long, or none.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or not all(0 < len(word) <= _MAX_STOP_LENGTH for word in stops):
        raise ApiError(
            f"`stop` must be at most {_MAX_STOPS} texts of at most {_MAX_STOP_LENGTH} characters, none of them empty.",
            "stop",
        )
    return stops


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's words; those of pictures count as written."""
    written = usage.text + usage.image
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": written,
        "total_tokens": usage.prompt + written,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.thoughts,
            "image_tokens": usage.image,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _envelope(answers: Answers, kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": answers.created,
        "model": model,
        "seed": answers.seed,
    }


def _completion(answers: Answers, found: dict[int, list[Piece]], model: str) -> dict[str, Any]:
    output_format = answers.asked.output_format
    return _envelope(answers, "chat.completion", model) | {
        "choices": [
            {
                "index": choice.index,
                "message": _message(choice, found[choice.index], output_format),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for choice in answers.choices
        ],
        "usage": usage_of(answers.usage),
    }


def _message(choice: Choice, pieces: Sequence[Piece], output_format: str) -> dict[str, Any]:
    """An answer as a message. Sent back as it is, it is read as the model wrote it."""
    said = {"text": Lines(), "thought": Lines()}
    words, thoughts = (
        "".join(lines.put(piece) for piece in pieces if piece.type == kind) for kind, lines in said.items()
    )
    images = [_image(piece, output_format) for piece in pieces if piece.type == "image"]
    message: dict[str, Any] = {"role": "assistant", "content": words or (None if images else ""), "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if images:
        message["images"] = images
    if images or thoughts:
        message["parts"] = [*_parts(choice.content)]
    return message


class Lines:
    """Words of several parts as one text: each part begins a line."""

    def __init__(self) -> None:
        self._part: int | None = None

    def put(self, piece: Piece) -> str:
        """More words."""
        is_new = self._part not in (None, piece.part)
        self._part = piece.part
        return f"\n{piece.text}" if is_new else piece.text


def _parts(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    parts, images = [], 0
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        else:
            parts.append({"type": "image", "index": images})
            images += 1
    return parts


def _image(piece: Piece, output_format: str) -> dict[str, Any]:
    url = data_url(piece.content, output_format)
    return {"type": "image_url", "index": piece.index, "image_url": {"url": url}}


async def _chunks(answers: Answers, model: str, include_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream; what is no delta of OpenAI's stands beside `choices`."""
    head = _envelope(answers, "chat.completion.chunk", model) | ({"usage": None} if include_usage else {})
    output_format = answers.asked.output_format

    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return head | {"choices": [choice]} | more

    words, thoughts = ({choice.index: Lines() for choice in answers.choices} for _ in range(2))
    for choice in answers.choices:
        yield chunk(choice.index, {"role": "assistant", "content": ""})
    async with aclosing(answers.pieces()) as pieces:
        async for choice, piece in pieces:
            place = {"image": piece.index, "step": piece.step}
            if piece.type == "text":
                yield chunk(choice.index, {"content": words[choice.index].put(piece)})
            elif piece.type == "thought":
                yield chunk(choice.index, {"reasoning_content": thoughts[choice.index].put(piece)})
            elif piece.type == "image":
                yield chunk(choice.index, {"images": [_image(piece, output_format)]})
            elif piece.type == "preview":
                url = {"url": data_url(piece.content, output_format)}
                yield chunk(choice.index, {}, preview=place | {"image_url": url})
            elif piece.type == "progress":
                yield chunk(choice.index, {}, progress=place | {"steps": piece.steps})
            else:
                yield chunk(choice.index, {}, choice.finish_reason)
    if include_usage:
        yield head | {"choices": [], "usage": usage_of(answers.usage)}
