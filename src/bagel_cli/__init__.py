# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""The command line: `bagel draw|edit|ask|chat|serve|demo|bench|info`. No library is imported before the arguments and the files are known to be
right, so that a mistake is told at once."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from .arguments import parse
from .files import CommandError, check_model, check_output, check_session, check_text, open_picture, read_benchmark


OWN_LOGGERS = ("transformers_bagel", "diffusers_bagel", "bagel_bench", "bagel_cli", "bagel_server", "uvicorn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options = parse(argv)
        if "output" in options:
            options.output = check_output(options.output)
        if getattr(options, "session", None) is not None:
            options.session = check_session(options.session)
        check_model(options.model)
        if "prompt" in options:
            check_text(options.prompt)
        if options.command == "bench":
            options.pictures, options.broken = read_benchmark(options)
        options.images = [open_picture(path) for path in options.images]
        _silence_libraries()
        from . import commands

        logging.disable(logging.NOTSET)
        getattr(commands, options.command)(options)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _silence_libraries() -> None:
    """Only what this project says, and errors, reach the screen; what is said while libraries are imported does not."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or record.name.startswith(OWN_LOGGERS))
    logging.lastResort = handler
