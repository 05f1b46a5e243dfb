# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Who may ask."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers

from .errors import ApiError
from .settings import ServerSettings


def check_key(headers: Headers, settings: ServerSettings) -> None:
    """
    Let nobody in without the key, if there is one.

    Args:
        headers (`Headers`): Of the request.
        settings ([`ServerSettings`])

    Raises:
        ApiError
    """
    if settings.api_key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # In a time that does not tell how much of it is right.
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), settings.api_key.encode()):
        raise ApiError(
            "The API key is wrong or missing. Send it as `Authorization: Bearer KEY`.",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
