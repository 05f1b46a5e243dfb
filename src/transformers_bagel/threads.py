# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Threads beside the one that computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar


Result = TypeVar("Result")


def in_own_thread(function: Callable[..., Result], *args: Any) -> Future[Result]:
    """
    Run a function in a thread that ends with it.

    On a CPU, each thread in which torch computes has helpers of its own as long as it lives. Once all threads together have more
    of them than there are cores, OpenMP lets every helper sleep between two operations: on two cores, small forwards then take
    1.6 times as long (docs/engine.md).
    """
    future: Future[Result] = Future()

    def run() -> None:
        # From now on, whoever no longer waits for it changes nothing; if nobody does by now, nothing is done.
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args))
        except BaseException as error:  # Raised where it is waited for.
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


async def run_in_own_thread(function: Callable[..., Result], *args: Any) -> Result:
    """
    The same for an event loop. Another thread starts this one: to start a thread is to wait until it runs, which takes
    milliseconds beside one that computes.
    """
    return await asyncio.wrap_future(await asyncio.to_thread(in_own_thread, function, *args))


__all__ = ["in_own_thread", "run_in_own_thread"]
