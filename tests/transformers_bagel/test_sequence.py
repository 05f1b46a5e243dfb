"""What follows from the types of the tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import max_error
from transformers_bagel.sequence import (
    IMAGE_TOKEN,
    LATENT_TOKEN,
    ExpertRouting,
    SequenceLayout,
    image_block_ids,
    patch_grid_ids,
    rope_positions,
)


def types(text: str) -> torch.Tensor:
    """`.` is text or a marker, `i` a ViT patch, `l` a latent patch."""
    return torch.tensor([[{".": 0, "i": IMAGE_TOKEN, "l": LATENT_TOKEN}[letter] for letter in text]])


def noisy(text: str, *blocks: tuple[int, int]) -> torch.Tensor:
    noised = torch.zeros(1, len(text), dtype=torch.bool)
    for start, stop in blocks:
        noised[0, start:stop] = True
    return noised


def test_a_block_takes_one_position():
    assert rope_positions(types("..iiii..."))[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 3]


def test_adjacent_blocks_take_one_position_each():
    assert rope_positions(types(".ll..ii..."))[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3]
    assert image_block_ids(types(".ll..ii..."))[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, -1, -1]


def test_padding_takes_no_position():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert rope_positions(types("...ii.."), mask)[0, 2:].tolist() == [0, 0, 0, 0, 1]


def test_a_noised_block_does_not_advance_and_its_clean_copy_stands_at_its_position():
    text = "..ll..ll..."
    positions = rope_positions(types(text), noised=noisy(text, (2, 4)))[0].tolist()
    assert positions == [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3]


def test_documents_start_again():
    documents = torch.tensor([[0] * 5 + [1] * 4])
    assert rope_positions(types("..ii...i."), document_ids=documents)[0].tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1]


def test_noised_blocks_hold_their_markers():
    text = "..ll..ll.."
    layout = SequenceLayout(types(text), noisy(text, (6, 8)))
    assert layout.noised_blocks()[0].tolist() == [False] * 5 + [True] * 4 + [False]
    assert not SequenceLayout(types(text)).noised_blocks().any()


def test_chunks_cut_text_from_blocks():
    assert SequenceLayout(types("...ii..ll..")).chunks() == [
        (0, 2, False),
        (2, 6, True),
        (6, 10, True),
        (10, 11, False),
    ]


def test_routing_sorts_and_restores():
    sequence_types = torch.cat([types("..ll.."), types(".l....")])
    routing = ExpertRouting.from_token_types(sequence_types)
    assert routing.num_und == 9
    sequence = torch.arange(12).view(2, 6, 1)
    tokens = routing.to_expert_order(sequence)
    assert tokens[9:, 0].tolist() == [2, 3, 7]
    assert torch.equal(routing.to_sequence(tokens), sequence)


def test_a_grid_beyond_the_table_is_refused_unless_it_is_interpolated():
    grid = torch.tensor([[9, 2]])
    with pytest.raises(ValueError, match="9 x 2 patches .* position table of 8 x 8"):
        patch_grid_ids(grid, 8)
    assert patch_grid_ids(grid, 8, interpolate=True).max() < 64


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_noised_block_in_a_sequence_equals_a_denoising_step(backend, model, encode):
    model.set_attn_implementation(backend)
    config = model.config
    prompt = encode(["a red circle"], add_generation_prompt=False)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 16, generator=generator)
    step = {
        "latents": latents,
        "latent_grid_hw": torch.tensor([[2, 3]]),
        "timesteps": torch.tensor([0.6]),
    }
    block = [config.vision_start_token_id, *[config.latent_token_id] * 6, config.vision_end_token_id]
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([prompt["input_ids"], torch.tensor([block])], dim=1), **step)
        model(**prompt, past_key_values=cache)
        length = prompt["input_ids"].shape[1]
        alone = model(**step, position_ids=torch.tensor([length]), past_key_values=cache)
        without_logits = model(latent_hidden_states=alone.latent_hidden_states)
    model.set_attn_implementation("sdpa")
    assert alone.logits is None
    assert max_error(whole.velocity, alone.velocity) <= 1e-5
    assert torch.equal(without_logits.velocity, alone.velocity)


def test_nothing_sees_a_noised_block_but_itself(model, encode):
    config = model.config
    prompt = encode(["a red circle"], add_generation_prompt=False)["input_ids"]
    block = torch.tensor([[config.vision_start_token_id, *[config.latent_token_id] * 4, config.vision_end_token_id]])
    ids = torch.cat([prompt, block, block, prompt], dim=1)
    step = {"latent_grid_hw": torch.tensor([[2, 2]] * 2), "timesteps": torch.tensor([0.6, 0.0])}
    latents = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids, latents=latents, **step)
        noised_changed = model(input_ids=ids, latents=torch.cat([latents[:4] + 1, latents[4:]]), **step)
        clean_changed = model(input_ids=ids, latents=torch.cat([latents[:4], latents[4:] + 1]), **step)
    block_end = prompt.shape[1] + 6
    assert torch.equal(plain.velocity[4:], noised_changed.velocity[4:])
    assert torch.equal(plain.logits[:, block_end:], noised_changed.logits[:, block_end:])
    assert torch.equal(plain.velocity[:4], clean_changed.velocity[:4])
    assert max_error(plain.logits[:, -1], clean_changed.logits[:, -1]) > 0


def test_attention_never_crosses_samples(model):
    ids = torch.randint(0, 400, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 7 + [1] * 5])
    with torch.no_grad():
        packed = model(input_ids=ids, document_ids=documents).logits
        alone = [model(input_ids=ids[:, :7]).logits, model(input_ids=ids[:, 7:]).logits]
    assert max_error(packed, torch.cat(alone, dim=1)) <= 1e-5


def test_a_noised_block_and_its_clean_copy_behind_images_equal_a_denoising_step(model, encode):
    """An edit: the block stands behind a condition, and its clean copy and a text stand behind it."""
    config = model.config
    prompt = dict(encode(["@square", "make it red"], add_generation_prompt=False, generation_mode="image"))
    del prompt["vae_pixel_values"]
    condition, noised = torch.randn(22, 16, generator=torch.Generator().manual_seed(0)).split([16, 6])
    prompt |= {"latents": condition, "latent_grid_hw": torch.tensor([[4, 4]]), "timesteps": torch.zeros(1)}
    block = [config.vision_start_token_id, *[config.latent_token_id] * 6, config.vision_end_token_id]
    whole = {
        "input_ids": torch.cat([prompt["input_ids"], torch.tensor([[*block, *block, 1, 2]])], dim=1),
        "pixel_values": prompt["pixel_values"],
        "image_grid_hw": prompt["image_grid_hw"],
        "latents": torch.cat([condition, noised, -noised]),
        "latent_grid_hw": torch.tensor([[4, 4], [2, 3], [2, 3]]),
        "timesteps": torch.tensor([0.0, 0.6, 0.0]),
    }
    cache = DynamicCache(config=config.text_config)
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
        alone = model(
            latents=noised,
            latent_grid_hw=torch.tensor([[2, 3]]),
            timesteps=torch.tensor([0.6]),
            position_ids=SequenceLayout(prompt["mm_token_type_ids"]).position_ids()[:, -1] + 1,
            past_key_values=cache,
        ).velocity
        assert max_error(model(**whole).velocity[16:22], alone) <= 1e-5
