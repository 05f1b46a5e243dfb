"""A context split in one process; `tests/distributed/` has two."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel import BagelPipeline
from tests.conftest import CHECKPOINT, load_processor
from transformers_bagel import PrefixView, SplitPrefixCache


SMALL = {"prompt": "a", "height": 32, "width": 48, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture
def pipe(model) -> BagelPipeline:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, transformer=model, processor=load_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def group():
    """The group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_split_needs_processes(pipe):
    with pytest.raises(RuntimeError, match="torchrun"):
        pipe.enable_context_split()


def test_a_split_needs_generators_and_can_be_undone(pipe, group):
    def drawn() -> torch.Tensor:
        return pipe(**SMALL, generator=torch.Generator().manual_seed(0)).images

    expected = drawn()
    pipe.enable_context_split()
    with pytest.raises(ValueError, match="`generator`"):
        pipe(**SMALL)
    assert torch.equal(drawn(), expected)
    pipe.disable_context_split()
    assert pipe(**SMALL).images.shape == expected.shape


def step(model, lengths: list[int], group) -> torch.Tensor:
    return model(
        latents=torch.randn(6, model.config.latent_dim),
        latent_grid_hw=torch.tensor([[2, 3]]),
        timesteps=torch.tensor([0.5]),
        position_ids=torch.tensor([0]),
        past_key_values=SplitPrefixCache([PrefixView(None)] * len(lengths), lengths, group),
    ).velocity


def test_a_split_is_of_the_blocks_that_are_denoised(model, group):
    with torch.no_grad(), pytest.raises(ValueError, match=r"\[7\] latents, got blocks of \[6\]"):
        step(model, [7], group)


def test_a_split_refuses_to_lose_gradients(model, group):
    with pytest.raises(RuntimeError, match="no_grad"):
        step(model, [6], group)
