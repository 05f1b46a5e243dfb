# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What a server counts, in Prometheus' format. Each application has a registry of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine
from .errors import too_many
from .session_cache import SessionCache


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
# What goes up and down; all else only goes up.
_NOW = ("running", "waiting", "sessions", "bytes")


class Metrics:
    """
    What a server counts.

    Args:
        engine ([`Engine`]), cache ([`SessionCache`]): Are asked when somebody reads.
    """

    def __init__(self, engine: Engine, cache: SessionCache):
        self.registry = CollectorRegistry()
        self.registry.register(_Stats("bagel_engine", engine))
        self.registry.register(_Stats("bagel_session_cache", cache))
        self.requests = Counter(
            "bagel_http_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "bagel_http_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_piece = Histogram(
            "bagel_first_piece_seconds",
            "From when a request was read to the first word or step.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("bagel_tokens", "Tokens of whole answers by kind.", ["kind"], registry=self.registry)

    def count(self, usage: Any) -> None:
        """Count the tokens of an answer."""
        for each in fields(usage):
            self.tokens.labels(each.name).inc(getattr(usage, each.name))

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Stats(Collector):
    """The fields of what `stats()` of something returns, when it is asked for."""

    def __init__(self, prefix: str, source: Any):
        self.prefix, self.source = prefix, source

    def collect(self) -> Iterator[Metric]:
        stats = self.source.stats()
        for each in fields(stats):
            family = GaugeMetricFamily if each.name in _NOW else CounterMetricFamily
            name = f"{self.prefix}_{each.name}"
            yield family(name, f"`{each.name}` of {type(stats).__name__}.", value=getattr(stats, each.name))


class Counted:
    """
    An application whose requests are counted, timed, and bounded in number, as each may hold a body in memory.

    Args:
        app (`ASGIApp`)
        metrics ([`Metrics`])
        max_requests (`int`): Of those to `/v1/`, at a time.
        timeout (`float`): Seconds for which a client may read nothing of what it is sent, before its place is another's.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_requests: int, timeout: float):
        self.app, self.metrics, self.max_requests, self.timeout = app, metrics, max_requests, timeout
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), "500"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            try:
                async with asyncio.timeout(self.timeout):
                    await send(message)
            except TimeoutError as error:
                # As if the client had gone.
                raise OSError("The client reads nothing.") from error

        is_bounded = scope["path"].startswith("/v1/")
        self._open += is_bounded
        try:
            is_full = is_bounded and self._open > self.max_requests
            await (too_many().response if is_full else self.app)(scope, receive, noted)
        finally:
            self._open -= is_bounded
            # Not the path, of which strangers can invent any number.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - began)
