# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser: one conversation that sees, speaks and draws."""

from .gpu_calls import GpuCalls
from .page import BagelPage, create_page


__all__ = ["BagelPage", "GpuCalls", "create_page"]
