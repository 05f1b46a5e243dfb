"""What is denoised together; and each image is what it is alone."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel import denoising
from diffusers_bagel.denoising import Denoiser, chunk_in_order
from diffusers_bagel.guidance import EDITING, RENORM_TYPES, TEXT_TO_IMAGE
from tests.conftest import conversation
from tests.diffusers_bagel.conftest import (
    EDIT,
    MIXED,
    SMALL,
    TEXTS,
    assert_equals_single_runs,
    close,
    encoded,
    seeded,
)


class TestResults:
    @pytest.mark.parametrize("renorm", RENORM_TYPES)
    def test_mixed_sizes(self, pipe, renorm):
        messages = [MIXED[0], conversation(["@tall", "swap the two shapes"]), MIXED[2]]
        assert_equals_single_runs(pipe, messages, cfg_renorm_type=renorm, image_guidance_scale=1.5, **EDIT)

    def test_taylorseer(self, own_pipe):
        own_pipe.enable_taylorseer(interval=2, warmup_steps=3, max_order=2)
        assert_equals_single_runs(own_pipe, MIXED[:4], **(SMALL | {"num_inference_steps": 8}))

    def test_callback_sees_all_images(self, pipe):
        seen = []

        def keep_the_first(pipeline, step, timestep, tensors):
            seen.append(tuple(tensors["latents"].shape))
            latents = tensors["latents"].clone()
            latents[1:] = 0
            return {"latents": latents}

        images = pipe(
            messages=MIXED[:3], generator=seeded(0, 1, 2), callback_on_step_end=keep_the_first, **EDIT
        ).images
        # The second has the default size, the largest.
        assert seen == [(3, 64, 16)] * 3
        assert close(images[0], pipe(messages=MIXED[0], generator=seeded(0), **EDIT).images[0])
        assert all(image.abs().max() == 0 for image in images[1:])

    @torch.no_grad()
    def test_each_image_has_the_velocity_that_it_has_alone_and_none_behind_its_tokens(self, pipe):
        prompts = [encoded(pipe, MIXED[index]) for index in (0, 1)]
        guidance, grids = [EDITING, TEXT_TO_IMAGE], [(3, 4), (2, 3)]
        contexts, _ = pipe.prepare_contexts(prompts, guidance)
        latents = torch.randn(2, 12, 16, generator=seeded(0))
        latents[1, 6:] = 0
        sigma = torch.tensor(0.8)
        together = Denoiser(pipe.transformer, contexts, grids, guidance).velocity(latents, sigma, sigma, 4.0)
        assert together[1, 6:].abs().max() == 0
        for index, (rows, columns) in enumerate(grids):
            alone = Denoiser(pipe.transformer, [contexts[index]], [grids[index]], [guidance[index]])
            own = latents[index : index + 1, : rows * columns]
            assert close(together[index, : rows * columns], alone.velocity(own, sigma, sigma, 4.0)[0])


class TestForwards:
    def test_branches_share_a_forward_inside_the_bound(self, pipe, forwards, monkeypatch):
        seen = forwards(pipe)
        settings = SMALL | {"num_inference_steps": 1}
        together = pipe(TEXTS[:3], generator=seeded(0, 1, 2), **settings).images
        assert seen.branches == [6]
        seen.denoising.clear()
        # Four branches of 12 tokens each.
        monkeypatch.setattr(denoising, "MAX_STEP_TOKENS_CPU", 48)
        parted = pipe(TEXTS[:3], generator=seeded(0, 1, 2), **settings).images
        assert seen.branches == [4, 2]
        assert close(parted, together)

    def test_branches_that_are_one_context_are_computed_once(self, pipe, forwards):
        """Before a last image there is nothing that only the whole conversation knows."""
        seen = forwards(pipe)
        pipe(messages=conversation(["make it like", "@square"]), cfg_interval=(0.0, 1.0), **EDIT)
        assert seen.branches == [2, 2, 2]

    def test_prefixes_are_laid_out_once_for_all_steps(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(TEXTS[:2], cfg_interval=(0.0, 1.0), **SMALL)
        assert len({id(kwargs["past_key_values"]) for kwargs in seen.denoising}) == 1


def test_chunks_keep_the_order_inside_the_bound():
    assert chunk_in_order([4, 4, 9, 1, 2], 8) == [[0, 1], [2], [3, 4]]
    assert chunk_in_order([], 8) == []
