"""The scripts of examples/shapes, which are no package, and the checkpoint that is shipped with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffusers_bagel import BagelPipeline


SHAPES = Path(__file__).parents[2] / "examples" / "shapes"

sys.path.insert(0, str(SHAPES))

from parts import CHECKPOINT  # noqa: E402  # the scripts are no package


@pytest.fixture(scope="session")
def shapes_pipe() -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe
