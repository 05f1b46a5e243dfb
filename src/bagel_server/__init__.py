# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Many users of one pipeline, in one process or behind OpenAI's interfaces."""

from .answers import EngineAnswer, EngineClosed, EngineFull
from .app import create_app
from .engine import Engine, EngineStats
from .settings import ServerSettings


__all__ = ["Engine", "EngineAnswer", "EngineClosed", "EngineFull", "EngineStats", "ServerSettings", "create_app"]
