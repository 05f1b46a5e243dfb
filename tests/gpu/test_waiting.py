"""The host never waits for the device: in a denoising step, reading, writing, a training's forward."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel.contexts import BagelContext, ContextReader
from tests.conftest import conversation
from tests.diffusers_bagel.conftest import encoded
from tests.gpu.common import EDIT, GPU, SMALL, model_of, needs_cuda, no_synchronization


pytestmark = needs_cuda


def test_a_denoising_step_does_not_wait(on_gpu):
    """The loop between the first callback and the last."""

    def begin(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 5 else "default")
        return tensors

    try:
        for settings in (SMALL, {**SMALL, "guidance_scale": 1.0}, EDIT):
            on_gpu("a red circle", **(settings | {"num_inference_steps": 8}), callback_on_step_end=begin)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("parts", [["a red circle"], ["@square", "make it green"]])
def test_the_pipeline_reads_a_prompt_without_waiting(parts, on_gpu):
    segments = encoded(on_gpu, conversation(parts))
    reader = ContextReader(on_gpu.transformer, on_gpu.processor, GPU)
    reader.read([BagelContext()], [segments])
    with no_synchronization():
        reader.read([BagelContext()], [segments])


@torch.no_grad()
def test_a_token_is_written_without_waiting(on_gpu):
    ids = torch.randint(5, 400, (1, 16), device=GPU)
    cache = on_gpu.transformer(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    step = {"input_ids": ids[:, :1], "position_ids": ids[:, :1], "past_key_values": cache}
    on_gpu.transformer(**step)
    with no_synchronization():
        on_gpu.transformer(**step)


def test_a_forward_of_a_batch_with_its_layout_does_not_wait(batch):
    model = model_of().to(GPU).train()
    moved = batch.to(GPU)
    model(**moved).loss.backward()
    with no_synchronization():
        model(**moved).loss.backward()
