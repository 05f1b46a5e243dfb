"""A real server in a thread, and the official client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn

from bagel_server import Engine, ServerSettings, create_app
from tests.diffusers_bagel.conftest import *  # noqa: F403


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[str]:
    """The URL of a server on a free port."""
    app = create_app(engine, ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
