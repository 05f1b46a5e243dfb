# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""BAGEL for diffusers: importing this package registers it with the library's loaders."""

from .caching import TaylorSeerConfig
from .guidance import BagelGuidance
from .lora import BagelLoraLoaderMixin
from .pipeline_bagel import BagelPipeline
from .pipeline_output import BagelPipelineOutput
from .registration import register_pipeline


__version__ = "0.1.0"


register_pipeline()

__all__ = ["BagelGuidance", "BagelLoraLoaderMixin", "BagelPipeline", "BagelPipelineOutput", "TaylorSeerConfig"]
