"""What a denoising step of the pipeline allocates, waits for, and makes anew."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel.denoising import Denoiser
from diffusers_bagel.guidance import TEXT_TO_IMAGE
from tests.conftest import conversation
from tests.diffusers_bagel.conftest import encoded
from tests.host_reads import HostReads
from tests.transformers_bagel.test_cache import allocated
from transformers_bagel import PrefixCache


@torch.no_grad()
def test_a_guided_step_allocates_the_same_for_a_longer_prompt(pipe):
    bytes_of_steps = {}
    latents, sigma = torch.randn(1, 4, 16), torch.tensor(0.9)
    # Above the block size of the attention kernel, whose scratch space grows up to it.
    for words in (1000, 3000):
        prompt = encoded(pipe, conversation(["a " * words]))
        contexts, _ = pipe.prepare_contexts([prompt], [TEXT_TO_IMAGE])
        denoiser = Denoiser(pipe.transformer, contexts, [(2, 2)], [TEXT_TO_IMAGE])

        def step(denoiser=denoiser) -> None:
            denoiser.velocity(latents, sigma, sigma, 4.0)

        step()
        bytes_of_steps[words] = allocated(step)
    # Tokens, keys and values, layers, heads, head_dim, float32.
    prefix_bytes = 2000 * 2 * 3 * 2 * 16 * 4
    assert bytes_of_steps[3000] - bytes_of_steps[1000] < 0.01 * prefix_bytes


@pytest.mark.parametrize("taylorseer", [False, True])
def test_the_host_waits_for_no_device_between_steps(own_pipe, taylorseer):
    if taylorseer:
        own_pipe.enable_taylorseer(interval=2, warmup_steps=2)
    with HostReads() as reads:
        reads.put(own_pipe.transformer)
        counts = []

        def count(pipeline, step, timestep, tensors):
            counts.append(list(reads.found))
            return tensors

        own_pipe(
            ["a red circle", "blue"],
            height=32,
            width=32,
            num_inference_steps=9,
            cfg_interval=(0.0, 1.0),
            output_type="latent",
            callback_on_step_end=count,
        )
    assert counts[0] == counts[-1], counts[-1]
    # Behind the last step it asks whether the latents are finite.
    assert len(reads.found) > len(counts[-1])


def test_what_steps_share_is_made_once(pipe, monkeypatch):
    made = []
    get_or_create = PrefixCache.get_or_create

    def watched(self, key, create):
        return get_or_create(self, key, lambda: made.append(1) or create())

    monkeypatch.setattr(PrefixCache, "get_or_create", watched)
    pipe("a red circle", height=32, width=32, num_inference_steps=9, cfg_interval=(0.5, 1.0), output_type="latent")
    # With guidance, and without.
    assert len(made) == 2
