"""The scripts of examples/shapes, which are no package, and the checkpoint that is shipped with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffusers_bagel import BagelPipeline


SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
CHECKPOINT = SHAPES / "checkpoint"

sys.path.insert(0, str(SHAPES))


@pytest.fixture(scope="session")
def shapes_pipe() -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe
