# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`/v1/images/generations` and `/v1/images/edits`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from diffusers_bagel.recalling import Turn

from .bodies import read_form, read_json, validated
from .errors import ApiError
from .generation import Answers, Asked, Generation, Piece, Usage
from .images import in_base64
from .messages import Reader
from .requests import Fields, lengths, refuse
from .settings import ServerSettings
from .sse import Events


router = APIRouter()


class PictureRequest(Fields):
    """The body of a request for pictures."""

    prompt: str
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto", "standard", "high"] | None = None
    background: Literal["auto", "opaque"] | None = None
    # Changes nothing here.
    moderation: Literal["auto", "low"] | None = None
    # Only under the values of `_UNSUPPORTED`.
    style: Any = None
    complexity: Any = None
    input_fidelity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    svg: Any = None
    mask: Any = None


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "style": (),
    "complexity": (),
    "input_fidelity": (),
    "frame_count": (),
    "frame_duration_ms": (),
    "svg": (),
    "mask": (),
}


@router.post("/v1/images/generations")
async def generate(request: Request) -> Response:
    """Draw pictures of a text."""
    generation: Generation = request.app.state.generation
    body = await read_json(request, PictureRequest, generation.settings)
    return await _drawn(request, body, [], "image_generation")


@router.post("/v1/images/edits")
async def edit(request: Request) -> Response:
    """Draw pictures of other pictures and a text."""
    generation: Generation = request.app.state.generation
    fields, files = await read_form(request, generation.settings)
    if "mask" in fields or any(name == "mask" for name, _ in files):
        raise ApiError("`mask` is not supported: the model is told in words what to change.", "mask")
    if (unknown := next((name for name, _ in files if name not in ("image", "image[]")), None)) is not None:
        raise ApiError(f"Unrecognized request argument supplied: {unknown[:64]}", unknown[:64])
    if not files:
        raise ApiError("`image` is missing: send at least one file.", "image")
    body = validated(PictureRequest, fields, are_strings=True)
    return await _drawn(request, body, [content for _, content in files], "image_edit")


async def _drawn(request: Request, body: PictureRequest, files: Sequence[bytes], kind: str) -> Response:
    generation: Generation = request.app.state.generation
    asked = await generation.read(_asked, body, files)
    if not body.stream:
        if body.partial_images:
            raise ApiError("`partial_images` is for `stream` alone.", "partial_images")
        async with generation.answers(request, asked) as answers:
            found = await answers.whole()
            return JSONResponse(_images(answers, found))
    return Events(request, answers := await generation.begin(asked), _events(answers, kind))


def _asked(body: PictureRequest, files: Sequence[bytes], settings: ServerSettings) -> Asked:
    body.check(settings)
    refuse(body, _UNSUPPORTED)
    reader = Reader(settings)
    parts = [reader.image(content, "image") for content in files]
    if not body.prompt:
        raise ApiError("`prompt` is empty. Say what to draw.", "prompt")
    parts.append(reader.text(body.prompt, "prompt"))
    chosen = body.drawing() | lengths(settings)
    if body.stream:
        chosen["progress"] = True
    reader.load()
    return Asked(
        [Turn(tuple(parts))],
        "image",
        chosen,
        body.n or 1,
        body.seed,
        (),
        body.output_format or "png",
        100 if body.output_compression is None else body.output_compression,
        names={"content": "prompt", "images": "image"} | ({"height": "size", "width": "size"} if body.size else {}),
        partial_images=body.partial_images or 0,
        is_conversation=False,
    )


def _head(answers: Answers) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": answers.asked.output_format,
        "quality": "high",
    }


def _size(piece: Piece) -> str:
    assert piece.image is not None
    return f"{piece.image.width}x{piece.image.height}"


def _images(answers: Answers, found: dict[int, list[Piece]]) -> dict[str, Any]:
    data, sizes = [], []
    for choice in answers.choices:
        pieces = found[choice.index]
        thoughts = _thoughts(pieces)
        for piece in pieces:
            if piece.type == "image":
                sizes.append(_size(piece))
                data.append({"b64_json": in_base64(piece.content), "seed": choice.seed} | thoughts)
    head = _head(answers) | {"size": sizes[0]}
    return {"created": answers.created, "data": data, "usage": usage_of(answers.usage)} | head


def _thoughts(pieces: Sequence[Piece]) -> dict[str, str]:
    """What the model thought before it drew."""
    thoughts = "".join(piece.text for piece in pieces if piece.type == "thought")
    return {"reasoning_content": thoughts} if thoughts else {}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's words."""
    written = usage.text + usage.image
    return {
        "input_tokens": usage.prompt,
        "output_tokens": written,
        "total_tokens": usage.prompt + written,
        "input_tokens_details": {
            "text_tokens": usage.prompt - usage.prompt_images,
            "image_tokens": usage.prompt_images,
        },
        "output_tokens_details": {"text_tokens": usage.text, "image_tokens": usage.image},
    }


async def _events(answers: Answers, kind: str) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a stream; `index` and those of the progress are not OpenAI's."""
    head = _head(answers) | {"created_at": answers.created}
    partial = {choice.index: 0 for choice in answers.choices}
    thoughts: dict[int, list[Piece]] = {choice.index: [] for choice in answers.choices}
    last: dict[int, Piece] = {}
    async with aclosing(answers.pieces()) as pieces:
        async for choice, piece in pieces:
            own: dict[str, Any] = {"index": choice.index}
            if piece.type == "preview":
                event = {"type": f"{kind}.partial_image", "partial_image_index": partial[choice.index]}
                partial[choice.index] += 1
                yield event | head | own | {"size": _size(piece), "b64_json": in_base64(piece.content)}
            elif piece.type == "progress":
                yield {"type": f"{kind}.progress", "step": piece.step, "steps": piece.steps} | own
            elif piece.type == "thought":
                thoughts[choice.index].append(piece)
                yield {"type": f"{kind}.reasoning.delta", "delta": piece.text} | own
            elif piece.type == "image":
                last[choice.index] = piece
            elif piece.type == "end":
                picture = last[choice.index]
                own |= {"seed": choice.seed, "usage": usage_of(choice.usage)} | _thoughts(thoughts[choice.index])
                event = {"type": f"{kind}.completed", "size": _size(picture), "b64_json": in_base64(picture.content)}
                yield event | head | own
