# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How errors speak of what they were given."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100


def some(names: Iterable[str], count: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def shown(value: Any) -> str:
    """A value as code, or the beginning of it: no message is filled with somebody's data."""
    text = _repr.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_error(error: Exception, message: str) -> Exception:
    """A message as the built-in kind of another error, which any process can read."""
    kinds = (TypeError, ValueError, OSError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)(message)
