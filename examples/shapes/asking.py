# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""How the model is asked when it is measured: what all rows use but those about one of them."""

from __future__ import annotations

from typing import Any


BATCH_SIZE = 25
STEPS = 25
DRAWING: dict[str, Any] = {"guidance_scale": 3.0}
EDITING: dict[str, Any] = {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
MAX_TOKENS = 64
