# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a request that fails is told: OpenAI's body of an error, with the field that is wrong."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from diffusers_bagel.answering import ContextLengthError

from .answers import EngineClosed, EngineFull


logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """
    What a request fails with.

    Args:
        message (`str`): One sentence.
        param (`str`, *optional*): The field that is wrong.
        status (`int`, *optional*, defaults to 400)
        code (`str`, *optional*): A word for programs.
        headers (`Mapping[str, str]`, *optional*): Of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's body of an error."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def unknown_model(name: str) -> ApiError:
    return ApiError(f"The model {name[:100]!r} does not exist here.", "model", 404, "model_not_found")


def too_large(what: str, param: str | None = None) -> ApiError:
    return ApiError(what, param, 413, "request_too_large")


def too_many(seconds: float = 1.0) -> ApiError:
    """No place is free for so many seconds."""
    return ApiError(
        "Too many requests wait for an answer. Ask again later.",
        status=429,
        code="queue_full",
        headers={"Retry-After": str(max(1, math.ceil(seconds)))},
    )


def refused(error: ValidationError, where: str = "") -> ApiError:
    """What pydantic found wrong first, in a part of a request at some place."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = f"{where}.{_path(first['loc'])}".strip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(f"Unrecognized request argument supplied: {param}", param, code="unknown_parameter")
    return ApiError(
        f"`{param}`: {first['msg']}." if param else f"{first['msg']}.", param or None, code="invalid_value"
    )


def _path(places: tuple[int | str, ...]) -> str:
    """Where a field stands: `messages[0].content`."""
    # Of a union, pydantic also names the member that was tried.
    names = [place for place in places if isinstance(place, int) or re.fullmatch(r"\w{1,64}", place)]
    names = [name for name in names if name not in ("str", "bool", "int", "float", "none")]
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)[1:]


def as_api_error(error: Exception, names: Mapping[str, str], has_begun: bool = False) -> ApiError:
    """
    What is told of an error of the engine or of a session.

    Args:
        error (`Exception`)
        names (`Mapping[str, str]`): What a request calls an argument of a session, where it is another name.
        has_begun (`bool`, *optional*, defaults to `False`):
            Whether all arguments were found to be right. Then a wrong value, such as a picture of NaN, is none of the client's.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFull):
        return too_many(error.retry_after)
    if isinstance(error, EngineClosed):
        return ApiError("The server is closing.", status=503, code="closing", headers={"Retry-After": "30"})
    if isinstance(error, TimeoutError):
        return ApiError("The answer took longer than the server allows.", status=504, code="timeout")
    if isinstance(error, ContextLengthError) or (isinstance(error, (TypeError, ValueError)) and not has_begun):
        told = _argument_error(str(error), names)
        if isinstance(error, ContextLengthError):
            told.param, told.code = names.get("content"), "context_length_exceeded"
        return told
    logger.error("An answer failed.", exc_info=error)
    return ApiError("The answer failed by an error of the server.", status=500, code="internal_error")


def _argument_error(message: str, names: Mapping[str, str]) -> ApiError:
    """An error of a session's argument, in the words of the request."""
    found = re.search(r"`(\w+)`", message)
    for ours, theirs in names.items():
        message = message.replace(f"`{ours}`", f"`{theirs}`")
    param = names.get(found[1], found[1]) if found else None
    return ApiError(message, param, code="invalid_value")


def install(app: FastAPI) -> None:
    """Let every error of an application be told in OpenAI's words."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(f"{error.detail}.", status=error.status_code, headers=error.headers).response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return ApiError("The request failed by an error of the server.", status=500, code="internal_error").response
