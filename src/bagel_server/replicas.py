# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What several replicas of the server need, whoever starts them: which of them a conversation belongs to, what all have counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families


# The name of Ray Serve's own header, which a cluster can change by `RAY_SERVE_SESSION_ID_HEADER_KEY`.
SESSION_HEADER = b"x-session-id"


def conversation_key(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> str | None:
    """
    What all requests of a conversation have in common.

    That is the header `x-session-id`; else OpenAI's field `prompt_cache_key`; else all messages up to the first of the user,
    which stay when a conversation goes on.

    Args:
        headers: Of the request, as ASGI has them.
        body (`bytes`): Of the request, whole.

    Returns:
        `str`, *optional*: Nothing for requests that belong to no conversation, or are none.
    """
    named = dict(headers).get(SESSION_HEADER)
    if named:
        return named.decode("latin-1")
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    named_in_body = request.get("prompt_cache_key")
    if isinstance(named_in_body, str) and named_in_body:
        # Whatever somebody wrote there, Ray gets a word that it can encode.
        return _digest(named_in_body)
    beginning = _beginning(request.get("messages") or request.get("input"))
    return None if beginning is None else _digest([request.get("instructions"), beginning])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _beginning(messages: Any) -> list[Any] | None:
    """Messages up to the first of the user; a text alone is one."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return None
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    return messages[: roles.index("user") + 1] if "user" in roles else None


class _Counted:
    """A collector, as prometheus_client calls what has a page's metrics."""

    def __init__(self, metrics: Iterable[Metric]):
        self.metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def merged_metrics(pages: Mapping[str, str]) -> bytes:
    """
    One page of Prometheus metrics of several.

    Args:
        pages (`Mapping[str, str]`): By the names of the replicas, which each sample gets as the label `replica`.
    """
    merged: dict[str, Metric] = {}
    for replica, page in pages.items():
        for metric in text_string_to_metric_families(page):
            family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                sample._replace(labels=sample.labels | {"replica": replica}) for sample in metric.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Counted(merged.values()))
    return generate_latest(registry)
