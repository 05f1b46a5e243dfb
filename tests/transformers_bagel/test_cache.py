"""Caches for drawing: forks, prefixes of branches, and what a denoising step allocates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from tests.conftest import load_model, max_error
from transformers_bagel import GrowingCache, PrefixBuffer, PrefixCache, PrefixView, fork_cache
from transformers_bagel.cache import GROWTH, GrowingLayer


GRID = torch.tensor([[2, 3]])


def prefilled(model, length: int, batch: int = 1, seed: int = 0) -> DynamicCache:
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=torch.randint(0, 400, (batch, length), generator=generator), past_key_values=cache)
    return cache


def snapshot(cache: DynamicCache) -> list[torch.Tensor]:
    return [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]


def step(model, cache, positions, grid=GRID, seed: int = 1, **kwargs) -> torch.Tensor:
    tokens = int(grid.prod(-1).sum())
    latents = torch.randn(tokens, model.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(
            latents=latents,
            latent_grid_hw=grid,
            timesteps=torch.full((len(grid),), 0.5),
            position_ids=torch.tensor(positions),
            past_key_values=cache,
            **kwargs,
        ).velocity


def test_a_fork_grows_alone_and_copies_nothing(model):
    cache = prefilled(model, 9)
    before = snapshot(cache)
    fork = fork_cache(cache)
    assert all(a.keys.data_ptr() == b.keys.data_ptr() for a, b in zip(cache.layers, fork.layers, strict=True))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=fork)
    assert (fork.get_seq_length(), cache.get_seq_length()) == (12, 9)
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(cache), strict=True))


def tokens(*ids: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([ids])}


@torch.no_grad()
def test_a_growing_cache_copies_its_tokens_once_in_many():
    layer, plain = GrowingLayer(), DynamicLayer()
    places = set()
    for length in (9, 1, 1, 3, GROWTH - 5, 1, 1):
        states = torch.randn(2, 2, 3, length, 4)
        for found, expected in zip(layer.update(*states), plain.update(*states), strict=True):
            assert torch.equal(found, expected)
        places.add(layer.keys.data_ptr())
    # The first tokens alone, a buffer, and a larger one.
    assert len(places) == 3


@torch.no_grad()
def test_forks_of_a_growing_cache_do_not_write_into_each_other(model):
    cache = model(**tokens(5, 6, 7), use_cache=True).past_key_values
    model(**tokens(8), past_key_values=cache)
    assert isinstance(cache, GrowingCache)
    forks = [fork_cache(cache) for _ in range(2)]
    for one, other in ((9, 10), (11, 12)):
        for fork, token in ((forks[0], one), (forks[1], other), (cache, 13)):
            model(**tokens(token), past_key_values=fork)
    for fork, ids in ((forks[0], (9, 11)), (forks[1], (10, 12)), (cache, (13, 13))):
        expected = model(**tokens(5, 6, 7, 8, *ids), use_cache=True).past_key_values
        for a, b in zip(snapshot(fork), snapshot(expected), strict=True):
            assert max_error(a, b) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
        lambda cache: copy.deepcopy(cache),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset", "deepcopy"],
)
def test_a_growing_cache_goes_on_after_a_change_like_a_plain_one(model, change):
    caches = GrowingCache(model.config), DynamicCache(config=model.config.text_config)
    for cache in caches:
        generator = torch.Generator().manual_seed(0)
        for length in (5, 1, 1):
            states = torch.randn(2, 2, 2, length, 4, generator=generator)
            cache.update(*states, 0)
        change(cache)
        batch = cache.layers[0].keys.shape[0] if cache.get_seq_length() else 2
        for length in (1, 2):
            states = torch.randn(2, batch, 2, length, 4, generator=generator)
            cache.update(*states, 0)
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert torch.equal(caches[0].layers[0].values, caches[1].layers[0].values)


def test_a_growing_cache_of_inference_mode_grows_outside_of_it(model):
    with torch.inference_mode():
        cache = model(**tokens(5, 6), use_cache=True).past_key_values
        model(**tokens(7), past_key_values=cache)
    with torch.no_grad():
        logits = model(**tokens(8), past_key_values=cache).logits
        assert max_error(logits, model(**tokens(5, 6, 7, 8)).logits[:, -1:]) <= 1e-5


def test_gradients_flow_through_a_growing_cache(model):
    cache = model(**tokens(5, 6), use_cache=True).past_key_values
    logits = model(**tokens(7), past_key_values=cache).logits
    whole = model(**tokens(5, 6, 7)).logits
    parameter = model.model.language_model.layers[0].self_attn.k_proj.weight
    gradients = [torch.autograd.grad(part[:, -1].sum(), parameter)[0] for part in (logits, whole)]
    assert max_error(*gradients) <= 1e-5 * gradients[0].abs().max()


def test_generate_makes_a_growing_cache_where_none_is_chosen(model):
    def cache_of(**chosen):
        return model.generate(**tokens(5, 6), max_new_tokens=2, return_dict_in_generate=True, **chosen).past_key_values

    given = DynamicCache(config=model.config.text_config)
    assert type(cache_of()) is type(cache_of(cache_implementation="dynamic")) is GrowingCache
    assert type(cache_of(cache_implementation="static")) is StaticCache
    assert cache_of(past_key_values=given) is given


def test_other_caches_are_not_forked_silently(model):
    with pytest.raises(TypeError, match="DynamicCache"):
        fork_cache(object())


@pytest.mark.parametrize("wrap", [lambda cache: cache, lambda cache: PrefixCache.from_cache(cache, scratch=8)])
def test_a_denoising_step_neither_grows_nor_changes_what_it_reads(model, wrap):
    cache = prefilled(model, 9)
    before = snapshot(cache)
    prefix = wrap(cache)
    first = step(model, prefix, [9])
    assert torch.equal(first, step(model, prefix, [9]))
    assert cache.get_seq_length() == 9
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(cache), strict=True))


def test_blocks_of_a_batch_equal_single_steps(model):
    caches = [prefilled(model, length, seed=length) for length in (5, 12, 1)]
    grids = torch.tensor([[2, 3], [1, 4], [3, 3]])
    cache = PrefixCache([PrefixView(PrefixBuffer.from_cache(each, scratch=11)) for each in caches])
    together = step(model, cache, [5, 12, 1], grids).split(grids.prod(-1).tolist())
    latents = torch.randn(19, model.config.latent_dim, generator=torch.Generator().manual_seed(1))
    for each, grid, velocity, own in zip(caches, grids, together, latents.split([6, 4, 9]), strict=True):
        with torch.no_grad():
            single = model(
                latents=own,
                latent_grid_hw=grid.unsqueeze(0),
                timesteps=torch.tensor([0.5]),
                position_ids=torch.tensor([each.get_seq_length()]),
                past_key_values=each,
            ).velocity
        assert max_error(velocity, single) <= 1e-5


def test_left_padding_of_a_cache_is_left_out(model):
    cache = DynamicCache(config=model.config.text_config)
    ids = torch.tensor([[7, 8, 9, 10], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    grids = GRID.repeat(2, 1)
    batch = step(model, cache, [4, 2], grids, attention_mask=mask).split(6)
    alone = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=ids[1:, 2:], past_key_values=alone)
    latents = torch.randn(12, model.config.latent_dim, generator=torch.Generator().manual_seed(1))[6:]
    with torch.no_grad():
        single = model(
            latents=latents,
            latent_grid_hw=GRID,
            timesteps=torch.tensor([0.5]),
            position_ids=torch.tensor([2]),
            past_key_values=alone,
        ).velocity
    assert max_error(batch[1], single) <= 1e-5


def test_a_branch_may_read_part_of_a_buffer_that_another_reads_in_full(model):
    cache = prefilled(model, 12)
    short = DynamicCache(config=model.config.text_config)
    for layer, source in enumerate(cache.layers):
        short.update(source.keys[:, :, :5], source.values[:, :, :5], layer)
    buffer = PrefixBuffer.from_cache(cache, scratch=8, common=5)
    views = [PrefixView(buffer), PrefixView(buffer, start=7), PrefixView(buffer, start=12)]
    grids, latents = GRID.repeat(3, 1), torch.randn(6, model.config.latent_dim).repeat(3, 1)
    with torch.no_grad():
        together = model(
            latents=latents,
            latent_grid_hw=grids,
            timesteps=torch.full((3,), 0.5),
            position_ids=torch.tensor([12, 5, 0]),
            past_key_values=PrefixCache(views),
        ).velocity.split(6)
        for velocity, own, position in zip(together, (cache, short, None), (12, 5, 0), strict=True):
            single = model(
                latents=latents[:6],
                latent_grid_hw=GRID,
                timesteps=torch.tensor([0.5]),
                position_ids=torch.tensor([position]),
                past_key_values=own,
            ).velocity
            assert max_error(velocity, single) <= 1e-5


def test_views_and_images_must_agree(model):
    with pytest.raises(ValueError, match="`past_key_values` holds 1 samples"):
        step(model, prefilled(model, 3), [3, 3], GRID.repeat(2, 1))
    with pytest.raises(ValueError, match="PrefixCache"), torch.no_grad():
        model(input_ids=torch.tensor([[1]]), past_key_values=PrefixCache.from_cache(prefilled(model, 3), 8))


def allocated(call) -> int:
    """Bytes that a call allocates, freed or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())


def random_prefix(model, length: int) -> PrefixCache:
    config = model.config.text_config
    head_dim = config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, head_dim)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return PrefixCache.from_cache(cache, scratch=8)


def test_a_denoising_step_copies_nothing_of_its_prefix():
    model = load_model(attn_implementation="sdpa")
    bytes_by_length = {}
    for length in (100, 40_000):
        prefix = random_prefix(model, length)
        step(model, prefix, [10])
        bytes_by_length[length] = allocated(lambda prefix=prefix: step(model, prefix, [10]))
    buffer = prefix.views[0].buffer
    prefix_bytes = sum(states.nbytes for states in (*buffer.keys, *buffer.values))
    # Attention keeps a few numbers a key block and thread; the prefix itself is 40 times that and more.
    assert bytes_by_length[40_000] - bytes_by_length[100] < 0.01 * prefix_bytes
