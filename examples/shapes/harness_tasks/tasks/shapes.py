# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What the tasks beside this file do with an item: those of lmms-eval, and `lm_eval_shapes_ask` of lm-evaluation-harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))

from shapes_tasks import is_right  # noqa: E402


def images(item: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(file) for file in item["images"]]


def judged(item: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"right": float(is_right(item, answers[0]))}
