"""Every attention backend gives the same numbers; blocks see what they should; padding has no influence."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.conftest import counted_sdpa, load_model, max_error
from transformers_bagel import PrefixCache
from transformers_bagel.sequence import SequenceLayout


PROMPTS = {
    # Of ten tokens and fewer, torch 2.13's compiled flex attention for CPUs reads memory that nobody wrote.
    "text": ["what is it, and what stands beside it?"],
    "image": ["@wide", "what is it?"],
    "interleaved": ["a", "@tall", "b", "@square", "c"],
}


def with_latents(inputs: dict, seed: int = 0) -> dict:
    """The inputs of a drawing condition, its VAE latents being noise."""
    grids = torch.tensor([(p.shape[1] // 16, p.shape[2] // 16) for p in inputs.pop("vae_pixel_values")])
    tokens = int(grids.prod(-1).sum())
    return {
        **inputs,
        "latents": torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed)),
        "latent_grid_hw": grids,
        "timesteps": torch.zeros(len(grids)),
    }


@pytest.fixture
def prompt(encode):
    def apply(name: str, latents: bool = False) -> dict:
        inputs = encode(PROMPTS[name], generation_mode="image" if latents else "text")
        return with_latents(dict(inputs)) if latents else dict(inputs)

    return apply


def drawn(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt, and the velocity of a step after it."""
    cache = DynamicCache(config=model.config.text_config)
    layout = SequenceLayout(inputs["mm_token_type_ids"])
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        velocity = model(
            latents=torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),
            latent_grid_hw=torch.tensor([[2, 3]]),
            timesteps=torch.tensor([0.7]),
            position_ids=layout.position_ids()[:, -1] + 1,
            past_key_values=cache,
        ).velocity
    return logits, velocity


@pytest.mark.parametrize("backend", ["eager", "flex_attention", {"text_config": "eager", "vision_config": "sdpa"}])
@pytest.mark.parametrize(("name", "latents"), [("text", False), ("interleaved", False), ("interleaved", True)])
def test_backends_agree(backend, name, latents, model, prompt):
    other = load_model(attn_implementation=backend)
    expected = drawn(model, prompt(name, latents))
    with counted_sdpa() as calls:
        actual = drawn(other, prompt(name, latents))
    for ours, theirs in zip(expected, actual, strict=True):
        assert max_error(ours, theirs) <= 1e-5
    assert (calls[0] > 0) == (isinstance(backend, dict) and name != "text"), "the tower's in the last case alone"


def test_sdpa_is_the_default(model, prompt):
    with counted_sdpa() as calls:
        model(**prompt("interleaved"))
    config = model.config
    assert calls[0] >= config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_one_forward_equals_segment_by_segment(name, latents, model, prompt):
    inputs = prompt(name, latents and name != "text")
    whole_cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        whole = model(**inputs, past_key_values=whole_cache).logits
    types = inputs["mm_token_type_ids"]
    layout = SequenceLayout(types)
    positions = layout.position_ids()
    cache = DynamicCache(config=model.config.text_config)
    images = {
        1: zip(
            inputs.get("pixel_values", torch.zeros(0)).split(inputs["image_grid_hw"].prod(-1).tolist()),
            inputs["image_grid_hw"],
            strict=True,
        )
        if "image_grid_hw" in inputs
        else iter(()),
        4: zip(
            inputs["latents"].split(inputs["latent_grid_hw"].prod(-1).tolist()), inputs["latent_grid_hw"], strict=True
        )
        if "latents" in inputs
        else iter(()),
    }
    pieces = []
    for start, stop, _ in layout.chunks():
        kind = int(types[0, start:stop].max())
        extra = {}
        if kind == 1:
            extra = dict(zip(("pixel_values", "image_grid_hw"), next(images[1]), strict=True))
            extra["image_grid_hw"] = extra["image_grid_hw"].unsqueeze(0)
        elif kind == 4:
            extra = dict(zip(("latents", "latent_grid_hw"), next(images[4]), strict=True))
            extra |= {"latent_grid_hw": extra["latent_grid_hw"].unsqueeze(0), "timesteps": torch.zeros(1)}
        with torch.no_grad():
            pieces.append(
                model(
                    input_ids=inputs["input_ids"][:, start:stop],
                    mm_token_type_ids=types[:, start:stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    **extra,
                ).logits
            )
    assert max_error(torch.cat(pieces, dim=1), whole) <= 1e-5
    for ours, theirs in zip(cache.layers, whole_cache.layers, strict=True):
        assert max_error(ours.keys, theirs.keys) <= 1e-5


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("name", ["image", "interleaved"])
def test_one_sample_computes_what_it_sees_and_nothing_else(name, latents, past, model, prompt, monkeypatch):
    inputs = prompt(name, latents)
    ones = inputs.pop("attention_mask")
    pairs: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, value, **kwargs):
        pairs.append(query.shape[2] * key.shape[2])
        return attend(query, key, value, **kwargs)

    def logits(mask: torch.Tensor | None) -> torch.Tensor:
        """Behind some words, if there is a past."""
        cache, words = DynamicCache(config=model.config.text_config), torch.tensor([[5, 6, 7]], device=model.device)
        positions = SequenceLayout(inputs["mm_token_type_ids"]).position_ids().to(model.device)
        if past:
            model(input_ids=words, past_key_values=cache)
            positions = positions + 3
            mask = None if mask is None else torch.nn.functional.pad(mask, (3, 0), value=1)
        pairs.clear()
        return model(**inputs, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

    layout = SequenceLayout(inputs["mm_token_type_ids"].cpu())
    seen = sum((stop - start) * (stop + 3 * past) for start, stop, _ in layout.chunks())
    with torch.no_grad():
        # A mask that hides nothing is a mask.
        expected = logits(ones)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        assert max_error(logits(None), expected) <= 1e-5
    chunks = len(layout.chunks())
    assert sum(pairs[-chunks:]) == seen < ones.shape[1] * (ones.shape[1] + 3 * past)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding_never_influences_other_tokens(backend, encode):
    model = load_model(attn_implementation=backend)
    inputs = dict(encode([["a"], ["@wide", "a long text that makes the other sample padded"]]))
    pad = inputs["attention_mask"] == 0
    assert pad.any()
    with torch.no_grad():
        plain = model(**inputs).logits
        inputs["input_ids"] = torch.where(pad, 77, inputs["input_ids"])
        perturbed = model(**inputs).logits
    assert torch.equal(plain[~pad], perturbed[~pad])
    assert plain[~pad].isfinite().all()


def test_an_image_sees_all_of_itself_and_text_only_what_came_before(model, prompt):
    inputs = prompt("image")
    with torch.no_grad():
        plain = model(**inputs).logits
        changed = dict(inputs, pixel_values=inputs["pixel_values"].clone())
        changed["pixel_values"][-1] += 1
        image_changed = model(**changed).logits
        changed = dict(inputs, input_ids=inputs["input_ids"].clone())
        changed["input_ids"][0, -2] += 1
        text_changed = model(**changed).logits
    # The start marker, in front of the changed patch, sees it; the text's end changes nothing before it.
    assert max_error(plain[:, 0], image_changed[:, 0]) > 0
    assert torch.equal(plain[:, :-2], text_changed[:, :-2])


@pytest.mark.parametrize(("name", "latents"), [("text", False), ("image", False), ("interleaved", True)])
def test_flash_attention_takes_text_and_images_chunk_by_chunk(name, latents, model, flash, prompt):
    for ours, theirs in zip(drawn(model, prompt(name, latents)), drawn(flash, prompt(name, latents)), strict=True):
        assert max_error(ours, theirs) <= 1e-5


def test_flash_attention_generates_the_same_tokens(model, flash, prompt):
    inputs = prompt("interleaved")
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), flash.generate(**inputs, max_new_tokens=8))


def test_flash_attention_packs_the_images_of_the_tower(model, flash, processor):
    images = [torch.rand(3, height, width) for height, width in ((64, 64), (70, 110))]
    inputs = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (each.get_image_features(**inputs).last_hidden_state for each in (model, flash))
    assert max_error(ours, theirs) <= 1e-5


def test_flash_attention_refuses_what_it_would_compute_wrongly(flash, encode):
    padded = encode([["a"], ["@wide", "what is it?"]])
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        flash(**padded)
    unlike = encode([["@square", "ab"], ["ab", "@square"]])
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        flash(**unlike)


def test_flash_attention_takes_padded_text(model, flash, encode):
    inputs = encode([["a"], ["a longer text"]])
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        assert max_error(model(**inputs).logits[real], flash(**inputs).logits[real]) <= 1e-5


def test_flash_attention_with_a_static_cache(model, flash, prompt):
    inputs = prompt("interleaved")
    static = flash.generate(**inputs, max_new_tokens=8, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, max_new_tokens=8))


def test_flash_attention_returns_hidden_states(model, flash, prompt):
    with torch.no_grad():
        ours, theirs = (each(**prompt("image"), output_hidden_states=True).hidden_states for each in (model, flash))
    assert all(max_error(*pair) <= 1e-5 for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_padding_never_influences_latents(backend, encode):
    model = load_model(attn_implementation=backend)
    inputs = with_latents(dict(encode([["@square", "b"], ["@wide", "and a text"]], generation_mode="image")))
    pad = inputs["attention_mask"] == 0
    with torch.no_grad():
        plain = model(**inputs)
        perturbed = model(**dict(inputs, input_ids=torch.where(pad, 77, inputs["input_ids"])))
    assert torch.equal(plain.logits[~pad], perturbed.logits[~pad])
    assert torch.equal(plain.velocity, perturbed.velocity)


def test_a_denoising_step_reads_a_static_cache(model, prompt):
    inputs = prompt("interleaved")
    step = {
        "latents": torch.randn(6, 16, generator=torch.Generator().manual_seed(1)),
        "latent_grid_hw": torch.tensor([[2, 3]]),
        "timesteps": torch.tensor([0.7]),
        "position_ids": SequenceLayout(inputs["mm_token_type_ids"]).position_ids()[:, -1] + 1,
    }
    velocities = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=200)):
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            velocities.append(model(**step, past_key_values=cache).velocity)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]
    assert max_error(*velocities) <= 1e-5


def training_loss(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a prompt's last tokens, and the gradient of a weight of the vision tower."""
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    loss = model.train()(**inputs, labels=labels).loss
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_trains_like_sdpa(checkpointing, flash, prompt):
    inputs = prompt("image")
    expected = training_loss(load_model(), inputs)
    if checkpointing:
        flash.gradient_checkpointing_enable()
    loss, gradient = training_loss(flash, inputs)
    assert abs(loss - expected[0]) <= 1e-5
    assert expected[1].abs().max() > 0
    assert max_error(gradient, expected[1]) <= 1e-5 * expected[1].abs().max()


def test_flash_attention_keeps_the_understanding_frozen(flash, prompt):
    inputs = prompt("interleaved", latents=True)
    gradients = []
    for model in (load_model(), flash):
        model.freeze("und")
        velocity = model.train()(**inputs).velocity
        weights = [model.model.language_model.layers[0].mlp_moe_gen.up_proj.weight, model.model.vae2llm.weight]
        gradients.append(torch.autograd.grad(velocity.square().sum(), weights))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        assert max_error(ours, theirs) <= 1e-4 * ours.abs().max()


def test_flash_attention_takes_padding_beside_equal_cuts(model, flash, encode):
    inputs = dict(encode([["a longer text", "@square", "b"], ["a text", "@square", "b"]]))
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    with torch.no_grad():
        ours, theirs = (each(**inputs).logits for each in (model, flash))
    assert max_error(ours[~padding], theirs[~padding]) <= 1e-5


def denoising_step(model, prompt, images: int = 2) -> dict:
    """A step of several images that share a prompt with images."""
    inputs = prompt("interleaved")
    cache = model(**inputs, use_cache=True).past_key_values
    return {
        "latents": torch.randn(6 * images, 16, generator=torch.Generator().manual_seed(1)),
        "latent_grid_hw": torch.tensor([[2, 3]] * images),
        "timesteps": torch.full((images,), 0.7),
        "position_ids": (SequenceLayout(inputs["mm_token_type_ids"]).position_ids()[:, -1] + 1).repeat(images),
        "past_key_values": PrefixCache.from_cache(cache, scratch=8).select([0] * images),
    }


@pytest.mark.parametrize("gradients", [False, True])
def test_denoising_in_train_mode_under_checkpointing_equals_eval_mode(gradients, model, prompt):
    with torch.no_grad():
        step = denoising_step(model, prompt)
        expected = model(**step).velocity
    trained = load_model().train()
    trained.gradient_checkpointing_enable()
    with torch.set_grad_enabled(gradients):
        found = trained(**step).velocity
    assert max_error(found.detach(), expected) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_denoising_and_its_prefix(checkpointing, prompt):
    """Two steps in a row, of two images that share a prefix: against every block by itself, without scratch space."""
    shared, alone = load_model(), load_model()
    if checkpointing:
        shared.train().gradient_checkpointing_enable()
    weights = [
        lambda model: model.model.language_model.layers[0].self_attn.k_proj_moe_gen.weight,
        lambda model: model.model.language_model.layers[1].self_attn.q_proj_moe_gen.weight,
        lambda model: model.model.vae2llm.weight,
    ]
    prefix_weight = alone.model.language_model.layers[0].self_attn.v_proj.weight

    step = denoising_step(alone.train(False), prompt)
    step["past_key_values"] = alone(**prompt("interleaved"), use_cache=True).past_key_values
    total = torch.zeros(())
    for _ in range(2):
        for index, latents in enumerate(step["latents"].split(6)):
            own = {name: step[name][index : index + 1] for name in ("latent_grid_hw", "timesteps", "position_ids")}
            velocity = alone(latents=latents, **own, past_key_values=step["past_key_values"]).velocity
            total = total + velocity.square().sum()
    *expected, through_prefix = torch.autograd.grad(total, [*(weight(alone) for weight in weights), prefix_weight])
    assert through_prefix.abs().max() > 0

    with torch.no_grad():
        step = denoising_step(alone, prompt)
    total = sum(shared(**step).velocity.square().sum() for _ in range(2))
    found = torch.autograd.grad(total, [weight(shared) for weight in weights])
    for own, other in zip(found, expected, strict=True):
        assert max_error(own, other) <= 1e-4 * other.abs().max()


def test_a_cache_is_not_written_twice_under_checkpointing():
    model = load_model().train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[5, 6, 7]])
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        model(input_ids=ids, past_key_values=cache)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 3


def test_images_of_one_size_are_seen_together(model):
    """Neighbours of one size share a call a layer; their features, and the maps, are those of each alone."""
    tower = model.model.vision_tower
    grids = [[2, 3], [2, 3], [3, 2], [4, 4], [2, 3]]
    pixels = torch.randn(
        sum(rows * columns for rows, columns in grids), tower.patch_dim, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        with counted_sdpa() as calls:
            together = tower(pixels, grids).last_hidden_state
        start, alone = 0, []
        for rows, columns in grids:
            own = pixels[start : start + rows * columns]
            alone.append(tower(own, [[rows, columns]]).last_hidden_state)
            start += rows * columns
    # Three of six patches, one of sixteen, one of six.
    assert calls[0] == 3 * tower.config.num_hidden_layers
    assert max_error(together, torch.cat(alone)) < 1e-5
