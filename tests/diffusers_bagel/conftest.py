"""The pipeline of the tiny checkpoint."""

from __future__ import annotations

import pytest
from tests.conftest import CHECKPOINT

from diffusers_bagel import BagelPipeline


@pytest.fixture(scope="session")
def pipe(model, processor) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe
