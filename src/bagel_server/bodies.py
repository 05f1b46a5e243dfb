# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Bodies of requests, bounded in size, time and depth, and never on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from .errors import ApiError, refused, too_large
from .settings import ServerSettings


Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
# More of a form is no picture and no setting.
_MAX_FIELDS = 100
# Of JSON, besides the characters of texts: 256 for each of 256 messages.
_MAX_VALUES = 2**16
# Bytes of JSON that take some milliseconds to be parsed.
_LARGE = 2**18


async def read_json(request: Request, model: type[Model], settings: ServerSettings) -> Model:
    """
    The body of a request as JSON.

    Raises:
        ApiError: naming the field that is wrong.
    """
    # A page in a browser can send other types to this machine without being asked for its origin.
    _check_type(request, "application/json")
    body = b"".join([chunk async for chunk in bounded(request, settings)])
    check_values(body, settings)
    content = await beside(body, _parsed, body)
    if not isinstance(content, dict):
        raise ApiError("The body must be a JSON object.", code="invalid_json")
    return validated(model, content)


def _parsed(body: bytes) -> Any:
    try:
        # Deeper than 200 levels is refused, too. NaN is refused by the field that has it.
        return from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise ApiError(f"The body is no JSON that is read here: {error}.", code="invalid_json") from error


async def beside(body: bytes, function: Callable[..., Result], *args: Any) -> Result:
    """What a function makes of a body, which for a large one is done beside the event loop."""
    return await asyncio.to_thread(function, *args) if len(body) > _LARGE else function(*args)


def check_values(body: bytes, settings: ServerSettings) -> None:
    """
    Refuse JSON that would become far more in memory than it is. What could begin a value is counted, whether or not it stands
    in a text.

    Raises:
        ApiError
    """
    most = settings.max_characters + _MAX_VALUES
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise too_large(f"The body has more than {most} values.")


def validated(model: type[Model], content: dict[str, Any], are_strings: bool = False, where: str = "") -> Model:
    """
    A request, or a part of one at some place in it, from its fields.

    Raises:
        ApiError: naming the field that is wrong.
    """
    try:
        return model.model_validate(content, strict=not are_strings)
    except ValidationError as error:
        raise refused(error, where) from error


class _InMemory(MultiPartParser):
    """A parser whose files stay in memory, as the body is bounded."""

    def __init__(self, request: Request, chunks: AsyncGenerator[bytes, None], settings: ServerSettings):
        super().__init__(
            request.headers,
            chunks,
            max_files=settings.max_images + 1,
            max_fields=_MAX_FIELDS,
            max_part_size=max(4 * settings.max_characters, 2**16),
        )
        self.spool_max_size = settings.max_body_bytes
        self.is_whole = False

    def on_end(self) -> None:
        super().on_end()
        self.is_whole = True


Fields = dict[str, str | list[str]]


async def read_form(request: Request, settings: ServerSettings) -> tuple[Fields, list[tuple[str, bytes]]]:
    """
    The fields of a form, and its files by their fields, in order. Those of a name that ends in `[]` are a list, as OpenAI's
    clients send one.

    Raises:
        ApiError: if it is none, or too large.
    """
    _check_type(request, "multipart/form-data")
    try:
        parser = _InMemory(request, bounded(request, settings), settings)
        form: FormData = await parser.parse()
    except MultiPartException as error:
        raise ApiError(f"The form cannot be read: {error.message}", code="invalid_form") from error
    if not parser.is_whole:
        # What was cut off may have been a setting.
        await form.close()
        raise ApiError("The form ends before its last boundary.", code="invalid_form")
    fields: Fields = {}
    files: list[tuple[str, bytes]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((name, await value.read()))
            elif name.endswith("[]") and isinstance(known := fields.setdefault(name[:-2], []), list):
                known.append(value)
            elif name.removesuffix("[]") in fields:
                raise ApiError(f"`{name[:64]}` is given twice.", name[:64], code="invalid_form")
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, files


def _check_type(request: Request, wanted: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise ApiError(
            f"The header Content-Type must be {wanted}, got {given[:64] or 'none'!r}.", status=415, code="invalid_type"
        )


async def bounded(request: Request, settings: ServerSettings) -> AsyncGenerator[bytes, None]:
    """The body of a request, as it comes."""
    limit = settings.max_body_bytes
    error = too_large(f"The request has more than {limit} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise error
    count = 0
    chunks = request.stream()
    deadline = asyncio.get_running_loop().time() + settings.body_timeout
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks, b"")
        except TimeoutError as slow:
            raise ApiError("The request took too long to arrive.", status=408, code="timeout") from slow
        except ClientDisconnect as gone:
            raise ApiError("The request broke off.", code="invalid_body") from gone
        if not chunk:
            return
        count += len(chunk)
        if count > limit:
            raise error
        yield chunk
