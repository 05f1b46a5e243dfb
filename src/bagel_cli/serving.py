# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""`bagel serve`: a pipeline behind OpenAI's interfaces, until the process is told to end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import uvicorn

from bagel_server import Engine, ServerSettings, create_app

from .commands import loaded
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


@contextmanager
def running_engine(options: argparse.Namespace) -> Iterator[Engine]:
    """An engine of the model that was asked for, which finishes what runs when the block ends."""
    with loaded(options) as pipe:
        pipe.set_progress_bar_config(disable=True)
        engine = Engine(pipe, options.max_running, options.max_waiting)
        try:
            yield engine
        finally:
            engine.close()


def serve(options: argparse.Namespace) -> None:
    """
    Serve a pipeline. Told to end (SIGTERM, or Ctrl-C), it takes nothing new and finishes what runs; told twice, it leaves.

    Raises:
        CommandError: if it cannot listen there.
    """
    settings = settings_of(options)
    # uvicorn raises what it caught again when all is done; that must not end the process before the engine has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running_engine(options) as engine:
        server = uvicorn.Server(
            uvicorn.Config(create_app(engine, settings), options.host, options.port, log_config=None, access_log=False)
        )
        server.run()
    if not server.started:
        raise CommandError(f"the server cannot listen at {options.host}, port {options.port}.")
