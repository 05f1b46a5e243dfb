# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How errors speak of what they were given."""

from __future__ import annotations

from typing import Any


def shown(value: Any, limit: int = 100) -> str:
    """A value as code, or its beginning: no message is filled with somebody's data."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
