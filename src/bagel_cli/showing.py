# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel demo`: a pipeline behind a page in the browser."""

from __future__ import annotations

import socket
from typing import Any

from bagel_demo import create_page
from bagel_server import Engine

from .files import CommandError


# Nobody else sees the page.
HOST = "127.0.0.1"


def check_port(port: int) -> None:
    """
    Refuse a port that is taken, before anything is loaded.

    Raises:
        CommandError: naming it.
    """
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise CommandError(f"--port {port}: nobody can listen there ({error.strerror}).") from error


def show(pipe: Any, port: int) -> None:
    """Show the page until the process is told to end."""
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe)
    page = create_page(engine)
    try:
        page.launch(server_name=HOST, server_port=port, quiet=True, prevent_thread_lock=True)
        print(f"http://{HOST}:{port}", flush=True)
        page.block_thread()
    finally:
        engine.close(0)
