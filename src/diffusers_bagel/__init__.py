# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL for diffusers: importing this package registers it with the library's loaders."""

import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "PROTOCOLS",
    "BagelGuidance",
    "BagelLoraLoaderMixin",
    "BagelPipeline",
    "BagelPipelineOutput",
    "BagelReply",
    "BagelSession",
    "InterleaveInferencer",
    "InterleaveProtocol",
    "Preset",
    "SessionEvent",
    "TaylorSeerConfig",
    "send_all",
]

# The command line reads its arguments before it imports a library, and `python -m` imports this before the command line.
if TYPE_CHECKING or ("-m", "diffusers_bagel") not in pairwise(sys.orig_argv):
    from .registration import (
        PRESETS,
        PROTOCOLS,
        BagelGuidance,
        BagelLoraLoaderMixin,
        BagelPipeline,
        BagelPipelineOutput,
        BagelReply,
        BagelSession,
        InterleaveInferencer,
        InterleaveProtocol,
        Preset,
        SessionEvent,
        TaylorSeerConfig,
        send_all,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import registration

        return getattr(registration, name)
