"""`torch.compile` of a denoising step: the same velocities, and no new graph for a new prompt length."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from tests.conftest import load_model, max_error
from transformers_bagel import PrefixCache


@pytest.fixture
def step():
    """A denoising step after a prompt of a given length."""
    model = load_model()

    def denoise(length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length)
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(input_ids=torch.randint(0, 400, (1, length), generator=generator), past_key_values=cache)
            return compiled_only_here(
                latents=torch.randn(12, 16, generator=generator),
                latent_grid_hw=torch.tensor([[3, 4]]),
                timesteps=torch.tensor([0.5]),
                position_ids=torch.tensor([length]),
                past_key_values=PrefixCache.from_cache(cache, room=14),
            ).velocity

    language_model = model.model.language_model
    plain = language_model.forward
    current = plain

    def compiled_only_here(**kwargs):
        language_model.forward = current
        try:
            return model(**kwargs)
        finally:
            language_model.forward = plain

    def use(forward):
        nonlocal current
        current = forward

    torch._dynamo.reset()
    counters.clear()
    yield denoise, use, plain
    torch._dynamo.reset()


def test_denoising_compiles_in_full_and_is_shared_by_all_prompt_lengths(step):
    denoise, use, plain = step
    lengths = (5, 9, 17, 33, 60)
    expected = [denoise(length) for length in lengths]
    use(torch.compile(plain, fullgraph=True))
    for length, velocity in zip(lengths, expected, strict=True):
        assert max_error(denoise(length), velocity) <= 1e-5
    # The second length turns the graph into one for any length.
    assert counters["stats"]["unique_graphs"] == 2
