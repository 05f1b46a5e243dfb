# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`/v1/responses`. Nothing is stored: a conversation goes on by sending back its items."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from .bodies import read_json, validated
from .errors import ApiError
from .generation import Answers, Asked, Generation
from .messages import Reader
from .requests import Sampling, lengths, refuse
from .response_events import ResponseEvents
from .settings import ServerSettings
from .sse import Events


router = APIRouter()


class ImageTool(BaseModel):
    """The tool by which a client allows pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_generation"]
    action: Literal["auto", "generate", "edit"] | None = None
    background: Literal["auto", "opaque"] | None = None
    model: str | None = None
    moderation: Literal["auto", "low"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    quality: Literal["auto", "standard", "high"] | None = None
    size: str | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponseRequest(Sampling):
    """The body of a request."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning: Reasoning | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    # Changes nothing here.
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream_options: Any = None
    # Only under the values of `_UNSUPPORTED`.
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    n: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    text: Any = None
    top_logprobs: Any = None
    truncation: Any = None


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory",),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


@router.post("/v1/responses")
async def respond(request: Request) -> Response:
    """Answer items in texts and pictures."""
    generation: Generation = request.app.state.generation
    body = await read_json(request, ResponseRequest, generation.settings)
    asked = await generation.read(asked_by, body)
    if body.stream:
        answers = await generation.begin(asked)
        return Events(request, answers, _events(answers, body, generation.settings.model))
    async with generation.answers(request, asked) as answers:
        *_, last = [event async for event in _events(answers, body, generation.settings.model)]
        return JSONResponse(last["response"])


def _events(answers: Answers, body: ResponseRequest, model: str) -> AsyncGenerator[dict[str, Any], None]:
    about = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "temperature": body.temperature,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "user": body.user,
    }
    return ResponseEvents(answers, model, about).events()


def asked_by(body: ResponseRequest, settings: ServerSettings) -> Asked:
    """
    What a request asks for.

    Raises:
        ApiError: naming the field that is wrong.
    """
    body.check(settings)
    refuse(body, _UNSUPPORTED)
    tool = _tool(body.tools)
    if tool is not None:
        for name in ("size", "output_format", "output_compression"):
            if getattr(body, name) is None:
                setattr(body, name, getattr(tool, name))
        body.check(settings)
    chosen = body.drawing() | body.sampling()
    chosen |= lengths(settings, body.max_images, max_output_tokens=body.max_output_tokens)
    if body.reasoning is not None and body.reasoning.effort is not None and body.think is None:
        chosen["think"] = body.reasoning.effort not in ("none", "minimal")
    partial_images = 0
    if body.stream:
        chosen["progress"] = True
        if body.preview_every is not None:
            chosen["preview_every"] = body.preview_every
        elif tool is not None:
            partial_images = tool.partial_images or 0
    return Asked(
        Reader(settings).turns(_messages(body), "input"),
        body.output or _output(body, tool),
        chosen,
        seed=body.seed,
        output_format=body.output_format or "png",
        compression=100 if body.output_compression is None else body.output_compression,
        names={"max_new_tokens": "max_output_tokens", "content": "input", "images": "input"}
        | ({"height": "size", "width": "size"} if body.size else {}),
        partial_images=partial_images,
    )


def _tool(tools: list[Any] | None) -> ImageTool | None:
    if not tools:
        return None
    for place, each in enumerate(tools):
        if not isinstance(each, dict) or each.get("type") != "image_generation":
            param = f"tools[{place}]"
            raise ApiError(f"`{param}`: the only tool here is `image_generation`.", param, code="unsupported_value")
    return validated(ImageTool, tools[0], where="tools[0]")


def _output(body: ResponseRequest, tool: ImageTool | None) -> str:
    choice = body.tool_choice
    if isinstance(choice, dict):
        choice = "required" if choice == {"type": "image_generation"} else None
    if choice not in (None, "none", "auto", "required") or (body.tool_choice is not None and choice is None):
        raise ApiError('`tool_choice` must be "none", "auto", "required", or the tool.', "tool_choice")
    if choice == "required" and tool is None:
        raise ApiError("`tool_choice` asks for a tool, and `tools` has none.", "tool_choice")
    if tool is None or choice == "none":
        return "text"
    return "image" if choice == "required" else "auto"


def _messages(body: ResponseRequest) -> list[Any]:
    """The items as messages of chat completions."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else list(body.input)
    messages = [_message(item, f"input[{place}]") for place, item in enumerate(items)]
    return [{"role": "system", "content": body.instructions}, *messages] if body.instructions else messages


def _message(item: Any, param: str) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "image_generation_call":
        result = item.get("result")
        if not isinstance(result, str):
            raise ApiError(f"`{param}.result` must be a picture in base64.", f"{param}.result")
        image = {"type": "image_url", "image_url": f"data:image/png;base64,{result}"}
        return {"role": "assistant", "content": [image]}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        texts = (
            [part.get("text") if isinstance(part, dict) else None for part in parts]
            if isinstance(parts, list)
            else [None]
        )
        if not all(isinstance(text, str) for text in texts):
            raise ApiError(f"`{param}.content` must be a list of texts.", f"{param}.content")
        return {"role": "assistant", "reasoning_content": "\n".join(map(str, texts)), "content": None}
    if kind == "item_reference":
        raise ApiError(
            f"`{param}` is an `item_reference`, and nothing is stored here: send the item itself, as with `store` false.",
            param,
            code="unsupported_value",
        )
    if kind not in (None, "message"):
        raise ApiError(
            f"`{param}` must be a message, or an item of an answer of this server.", param, code="invalid_value"
        )
    return item
