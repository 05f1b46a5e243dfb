"""bagel-shapes behind an engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_server import Engine
from diffusers_bagel import BagelPipeline


SHAPES = Path(__file__).parents[2] / "examples" / "shapes"

sys.path.insert(0, str(SHAPES))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    pipe = BagelPipeline.from_pretrained(SHAPES / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    engine = Engine(pipe)
    yield engine
    engine.close(0)
