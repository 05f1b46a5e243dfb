"""The pipeline of the tiny checkpoint."""

from __future__ import annotations

import pytest

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT


@pytest.fixture(scope="session")
def pipe(model, processor) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe
