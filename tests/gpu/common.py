"""What the tests of an accelerator share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, golden_image, load_processor
from transformers_bagel import BagelForConditionalGeneration


ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes" / "checkpoint"
GPU = torch.device(
    os.environ.get("BAGEL_TEST_DEVICE") or torch.accelerator.current_accelerator(check_available=True) or "cpu"
)
needs_cuda = pytest.mark.skipif(GPU.type != "cuda", reason="needs CUDA")
needs_accelerator = pytest.mark.skipif(GPU.type == "cpu", reason="needs memory beside the CPU's")

SMALL = {"height": 48, "width": 64, "num_inference_steps": 4, "output_type": "pt"}
EDIT = {"image": golden_image("square"), "num_inference_steps": 4, "output_type": "pt", "vae_sample_mode": "argmax"}
# Of float32 on two devices, for pixels in [0, 1].
BOUND = 1e-3


def load(**kwargs) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, processor=load_processor(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_shapes(**kwargs) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(SHAPES, **kwargs).to(GPU)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_of(**kwargs) -> BagelForConditionalGeneration:
    return BagelForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)


def noise() -> torch.Tensor:
    return torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))


def drawn(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    return pipe("a red circle", latents=noise(), **(SMALL | kwargs)).images.cpu()


def edited(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    """Of all that a pipeline does with its transformer: seeing, thinking, drawing."""
    generator = torch.Generator().manual_seed(0)
    out = pipe("make it green", think=True, max_think_tokens=4, generator=generator, **(EDIT | kwargs))
    return out.images.cpu()


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
