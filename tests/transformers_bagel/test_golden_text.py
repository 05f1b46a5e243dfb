"""Every text case of the golden set, through the processor and `generate()`."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import CASES, DEVICE, golden_image, max_error
from transformers_bagel.sequence import patch_grid_ids, rope_positions


@pytest.mark.parametrize("case", CASES["text"], ids=lambda case: case["key"])
def test_prefill_gives_the_original_keys_and_values(case, model, encode, golden):
    inputs = encode(case["inputs"], add_generation_prompt=False, think=case.get("think", False))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == case["kv_len"]
    positions = rope_positions(inputs["mm_token_type_ids"], inputs["attention_mask"])
    assert int(positions[0, -1]) + 1 == case["rope"]
    for index, layer in enumerate(cache.layers):
        for name, states in (("key", layer.keys), ("value", layer.values)):
            expected = golden[f"{case['key']}.prefill.{name}.{index}"]
            assert max_error(states[0].transpose(0, 1), expected) <= 1e-4


@pytest.mark.parametrize("case", CASES["text"], ids=lambda case: case["key"])
def test_generate_gives_the_original_tokens_and_logits(case, model, processor, encode, golden):
    inputs = encode(case["inputs"], think=case.get("think", False))
    steps = len(golden[f"{case['key']}.logits"])
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # The original loop records the start token that it feeds, and drops the token after its last step.
    tokens = out.sequences[0, inputs["input_ids"].shape[1] - 1 :]
    assert tokens[: len(case["tokens"])].tolist() == case["tokens"]
    assert max_error(torch.cat(out.logits)[:steps], golden[f"{case['key']}.logits"]) <= 1e-4
    assert processor.decode(tokens[: len(case["tokens"])], skip_special_tokens=True) == case["text"]


def test_vision_tower_and_connector(model, processor, golden):
    images = processor.image_processor(golden_image(CASES["vae_case"]), return_tensors="pt").to(DEVICE)
    assert max_error(images["pixel_values"], golden["vit.patches"]) <= 1e-6
    grid = images["image_grid_hw"]
    assert (
        patch_grid_ids(grid, model.config.vit_max_num_patch_per_side).tolist() == golden["vit.position_ids"].tolist()
    )
    with torch.no_grad():
        outputs = model.get_image_features(**images)
    assert max_error(outputs.last_hidden_state, golden["vit.features"]) <= 1e-4
    assert max_error(outputs.pooler_output[0], golden["vit.embeds"]) <= 1e-4


def test_time_embedding(model, golden):
    with torch.no_grad():
        embeddings = model.model.time_embedder(golden["time.t"].to(DEVICE))
    assert max_error(embeddings, golden["time.embed"]) <= 1e-4


@pytest.mark.parametrize("case", CASES["position_ids"], ids=lambda case: f"{case['h']}x{case['w']}")
def test_patch_grid_ids(case):
    grid = torch.tensor([[case["h"] // case["patch"], case["w"] // case["patch"]]])
    assert patch_grid_ids(grid, case["max"]).tolist() == case["extrapolate"]
    assert patch_grid_ids(grid, case["max"], interpolate=True).tolist() == case["interpolate"]
