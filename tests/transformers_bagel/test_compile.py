"""`torch.compile` of a denoising step: the same velocities, and no new graph for a new prompt length."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

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
                past_key_values=PrefixCache.from_cache(cache, scratch=14),
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


@pytest.fixture
def layers_compiled():
    """A model whose layers are compiled, and one that is not; graphs are counted, not built."""
    torch._dynamo.reset()
    counters.clear()
    model = load_model()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    yield model, load_model()
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_one_graph_denoises_in_all_layers_and_after_all_prompts(layers_compiled):
    compiled, plain = layers_compiled
    for length in (5, 9, 17, 33, 60):
        generator = torch.Generator().manual_seed(length)
        cache = plain(
            input_ids=torch.randint(0, 400, (1, length), generator=generator), use_cache=True
        ).past_key_values
        inputs = {
            "latents": torch.randn(12, 16, generator=generator),
            "latent_grid_hw": torch.tensor([[3, 4]]),
            "timesteps": torch.tensor([0.5]),
            "position_ids": torch.tensor([length]),
            "past_key_values": PrefixCache.from_cache(cache, scratch=14),
        }
        assert max_error(compiled(**inputs).velocity, plain(**inputs).velocity) <= 1e-5
    # The second length turns the graph into one for any length.
    assert graphs() == 2


@torch.no_grad()
def test_one_graph_decodes_in_all_layers_and_after_all_prompts(layers_compiled):
    compiled, plain = layers_compiled
    for length in (5, 9, 17, 33):
        ids = torch.randint(5, 400, (1, length + 3), generator=torch.Generator().manual_seed(length))
        cache = StaticCache(config=plain.config.text_config, max_cache_len=64)
        plain(input_ids=ids[:, :length], past_key_values=cache)
        expected = plain(input_ids=ids).logits
        for place in range(length, length + 3):
            inputs = {"input_ids": ids[:, place : place + 1], "position_ids": torch.tensor([[place]])}
            logits = compiled(**inputs, past_key_values=cache).logits
            assert max_error(logits[:, -1], expected[:, place]) <= 1e-4
    assert graphs() == 1


def test_a_cache_that_moves_its_layers_is_asked_by_number(model):
    class Noting(DynamicCache):
        seen: list[int] = []

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            self.seen.append(layer_idx)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    cache = Noting(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    assert cache.seen == list(range(model.config.text_config.num_hidden_layers))
