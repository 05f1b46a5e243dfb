# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The application: routes, and who may ask."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from . import chat, errors, pictures, responses
from .engine import Engine
from .errors import unknown_model
from .generation import Generation
from .keys import check_key
from .metrics import Counted, Metrics
from .session_cache import SessionCache
from .settings import ServerSettings


router = APIRouter()


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """
    An application with OpenAI's interfaces, for any ASGI server.

    Args:
        engine ([`Engine`]): Makes the answers. Whoever made it closes it.
        settings ([`ServerSettings`], *optional*)

    Example:

    ```python
    >>> import uvicorn
    >>> from bagel_server import Engine, ServerSettings, create_app

    >>> engine = Engine(pipe)
    >>> uvicorn.run(create_app(engine, ServerSettings(model="bagel")))
    >>> engine.close()
    ```
    """
    settings = settings or ServerSettings()
    app = FastAPI(title="BAGEL", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    cache = SessionCache(settings.max_cache_bytes)
    app.state.metrics = Metrics(engine, cache)
    app.state.generation = Generation(engine, settings, app.state.metrics, cache)
    app.state.created = int(time.time())
    errors.install(app)
    for each in (router, chat.router, pictures.router, responses.router):
        app.include_router(each, dependencies=[Depends(_has_key)])
    app.include_router(_open)
    app.add_middleware(
        Counted, metrics=app.state.metrics, max_requests=settings.max_requests, timeout=settings.timeout
    )
    return app


# In the event loop: what is no coroutine takes a turn in another thread.
async def _has_key(request: Request) -> None:
    check_key(request.headers, request.app.state.generation.settings)


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> JSONResponse:
    """The one model, by its name."""
    if name != request.app.state.generation.settings.model:
        raise unknown_model(name)
    return JSONResponse(_model(request))


def _model(request: Request) -> dict[str, str | int]:
    state = request.app.state
    return {"id": state.generation.settings.model, "object": "model", "created": state.created, "owned_by": "bagel"}


# Of who watches the server, and has no key.
_open = APIRouter()


@_open.get("/health")
async def health(request: Request) -> JSONResponse:
    """Whether new requests are taken."""
    is_closed = request.app.state.generation.engine.is_closed
    return JSONResponse({"status": "closing" if is_closed else "ok"}, 503 if is_closed else 200)


@_open.get("/metrics")
async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
