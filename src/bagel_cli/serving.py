# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel serve`: a pipeline behind OpenAI's interfaces, until the process is told to end."""

from __future__ import annotations

import argparse
import math
import signal
import socket
import sys
from dataclasses import fields
from typing import Any

import uvicorn

from bagel_server import Engine, ServerSettings, create_app

from .files import CommandError


def settings_of(options: argparse.Namespace) -> ServerSettings:
    """
    What a server allows, by the command line.

    Raises:
        CommandError: if it cannot be.
    """
    names = {each.name for each in fields(ServerSettings)} - {"model"}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    try:
        return ServerSettings(model=options.name or options.model, **given)
    except ValueError as error:
        raise CommandError(str(error)) from error


def bound_socket(options: argparse.Namespace) -> socket.socket:
    """
    A socket at the address that is to be served, at which nobody can ask yet.

    Raises:
        CommandError: if it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        where = f"--host {options.host}, --port {options.port}"
        raise CommandError(f"{where}: nobody can listen there ({error.strerror})") from error
    return bound


def serve(pipe: Any, options: argparse.Namespace, settings: ServerSettings, bound: socket.socket) -> None:
    """
    Serve a pipeline. Told to end, by SIGTERM or Ctrl-C, it takes nothing new and finishes what runs.

    Args:
        pipe ([`BagelPipeline`])
        options (`argparse.Namespace`): Of the command line.
        settings ([`ServerSettings`])
        bound (`socket.socket`): Where to listen.
    """
    # uvicorn raises what it caught again when all is done; that must not end the process before the engine has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe, options.max_running, options.max_waiting)
    config = uvicorn.Config(
        create_app(engine, settings),
        log_config=None,
        access_log=False,
        # No answer takes longer.
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    server = uvicorn.Server(config)
    host, port = bound.getsockname()[:2]
    print(f"{settings.model}: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    try:
        server.run([bound])
    except KeyboardInterrupt:
        # All is done.
        pass
    finally:
        engine.close(0 if server.force_exit else None)
