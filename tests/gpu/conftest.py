"""The tests of an accelerator: `BAGEL_TEST_DEVICE` names one, or it is the machine's. Without one they are skipped, and stand-ins
take their place (`tests/emulated_devices.py`); `BAGEL_TEST_DEVICE=cpu` runs those that a CPU can."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from diffusers_bagel import BagelPipeline
from tests.conftest import conversation, max_error, training_samples
from tests.gpu.common import BOUND, GPU, load
from transformers_bagel import BagelDataCollator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU.type != "cpu" or "BAGEL_TEST_DEVICE" in os.environ:
        return
    for item in items:
        if "/tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def within(record_property) -> Callable[[float, float], None]:
    """Hold an error to its bound, and note both for who reads the report."""

    def check(error: float, bound: float) -> None:
        record_property("error", [error, bound])
        assert error <= bound

    return check


@pytest.fixture
def agree(within) -> Callable[..., None]:
    """Hold two results to each other."""

    def check(found: torch.Tensor, expected: torch.Tensor, bound: float = BOUND) -> None:
        within(max_error(found, expected), bound)

    return check


@pytest.fixture(scope="session")
def on_cpu() -> BagelPipeline:
    return load()


@pytest.fixture(scope="session")
def on_gpu() -> BagelPipeline:
    return load().to(GPU)


@pytest.fixture
def question(on_gpu):
    """A prompt with a picture, on the CPU."""
    return on_gpu.processor.apply_chat_template(
        conversation(["@wide", "what is it?"]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.fixture
def collator(on_gpu) -> BagelDataCollator:
    settings = {"text_dropout": 0.0, "vit_dropout": 0.0, "vae_dropout": 0.0, "vae_sample_mode": "argmax"}
    generator = torch.Generator().manual_seed(0)
    return BagelDataCollator(on_gpu.processor, vae=on_gpu.vae, generator=generator, return_layout=True, **settings)


@pytest.fixture
def batch(collator) -> dict:
    return collator(training_samples("talk", "look", "draw", "edit"))
