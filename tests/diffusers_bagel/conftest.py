"""The pipeline of the tiny checkpoint, and how the tests call it."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_processor


SMALL = {"height": 48, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
EDIT = {"num_inference_steps": 3, "output_type": "latent"}


def seeded(*seeds: int):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


@pytest.fixture(scope="session")
def pipe(model, processor) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own_pipe(model) -> BagelPipeline:
    """A pipeline that a test may change."""
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=copy.deepcopy(model), processor=load_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe
