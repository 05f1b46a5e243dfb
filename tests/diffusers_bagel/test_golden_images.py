"""Every image case of the golden set, through the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import CASES, DEVICE, golden_image, max_error
from tests.diffusers_bagel.conftest import golden_arguments


@pytest.fixture
def configured(pipe):
    """The pipeline with a case's shift and TaylorSeer, put back afterwards."""

    def configure(case: dict):
        pipe.scheduler.set_shift(case["params"]["timestep_shift"])
        if case["params"].get("enable_taylorseer"):
            pipe.enable_taylorseer()
        return pipe

    yield configure
    pipe.scheduler.set_shift(3.0)
    pipe.disable_taylorseer()


@pytest.mark.parametrize("case", CASES["image"], ids=lambda case: case["key"])
def test_pipeline_gives_the_published_trajectory_and_image(case, configured, golden):
    pipe = configured(case)
    key = case["key"]
    trajectory = []
    calls = []

    def record(pipeline, step, timestep, tensors):
        calls.append(pipeline)
        trajectory.append(tensors["latents"][0].to("cpu", copy=True))
        return tensors

    noise = golden[f"{key}.noise"].unsqueeze(0)
    out = pipe(**golden_arguments(case), latents=noise, output_type="latent", callback_on_step_end=record)
    sigmas = calls[-1].scheduler.sigmas.cpu()
    assert max_error(sigmas[:-1], golden[f"{key}.t"]) == 0.0
    steps = torch.stack([noise[0], *trajectory])
    velocity = (steps[:-1] - steps[1:]) / -sigmas.diff()[:, None, None]
    assert max_error(velocity, golden[f"{key}.velocity"]) <= 1e-4
    assert max_error(out.images[0], golden[f"{key}.latent"]) <= 5e-4
    assert out.texts == ([case["think_text"]] if case.get("think") else None)

    image = np.asarray(pipe(**golden_arguments(case), latents=noise).images[0])
    assert np.abs(image.astype(int) - golden[f"{key}.image"].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("case", CASES["image"], ids=lambda case: case["key"])
def test_contexts_have_the_published_lengths_and_positions(case, configured, monkeypatch):
    pipe = configured(case)
    seen = {}
    prepare = pipe.prepare_contexts

    def record(*args, **kwargs):
        contexts, plans = prepare(*args, **kwargs)
        seen.update(contexts[0])
        return contexts, plans

    monkeypatch.setattr(pipe, "prepare_contexts", record)
    pipe(**(golden_arguments(case) | {"num_inference_steps": 1}), output_type="latent")
    names = {"gen": "full", "no_text": "no_text", "no_image": "no_image"}
    for published, name in names.items():
        if name in seen:
            assert seen[name].length == case["kv_lens"][published]
            assert seen[name].next_position == case["ropes"][published]


@pytest.mark.parametrize("schedule", CASES["schedules"], ids=lambda schedule: str(schedule["num_timesteps"]))
def test_scheduler_gives_the_published_noise_levels(schedule, pipe):
    pipe.scheduler.set_shift(schedule["shift"])
    steps = schedule["num_timesteps"] - 1
    calls = []

    def record(pipeline, step, timestep, tensors):
        calls.append(pipeline)
        return tensors

    settings = {"guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    pipe("a", num_inference_steps=steps, callback_on_step_end=record, **settings)
    assert max_error(calls[-1].scheduler.sigmas, torch.tensor(schedule["t"])) == 0.0
    pipe.scheduler.set_shift(3.0)


def test_vae_matches_the_published_encoder_and_decoder(pipe, processor, golden):
    image = processor.image_processor(golden_image(CASES["vae_case"]), return_vae_pixel_values=True)
    pixels = image["vae_pixel_values"][0].unsqueeze(0).to(DEVICE)
    vae = pipe.vae
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        scale = lambda latents: (latents - vae.config.shift_factor) * vae.config.scaling_factor  # noqa: E731
        assert max_error(scale(posterior.mode()), golden["vae.encode_scaled_mean"]) <= 1e-4
        sample = posterior.sample(torch.Generator().manual_seed(7))
        assert max_error(scale(sample), golden["vae.encode_sampled_seed7"]) <= 1e-4
        latents = golden["vae.encode_scaled_mean"].to(DEVICE) / vae.config.scaling_factor + vae.config.shift_factor
        assert max_error(vae.decode(latents).sample, golden["vae.decode"]) <= 1e-4
