# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Many users of one pipeline."""

from .answers import EngineAnswer, EngineClosed, EngineFull
from .engine import Engine, EngineStats


__all__ = ["Engine", "EngineAnswer", "EngineClosed", "EngineFull", "EngineStats"]
