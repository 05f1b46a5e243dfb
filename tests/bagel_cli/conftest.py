"""The tiny checkpoint as commands read it."""

from __future__ import annotations

import pytest

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT


@pytest.fixture(scope="session")
def saved(model, processor, tmp_path_factory) -> str:
    """In diffusers' layout, with image sizes that it can take."""
    folder = tmp_path_factory.mktemp("saved")
    BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor).save_pretrained(folder)
    return str(folder)
