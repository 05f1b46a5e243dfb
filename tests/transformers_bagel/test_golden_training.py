"""The training case of the golden set: one packed sequence, its positions, mask, losses and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CASES, DEVICE, load_model, max_error
from transformers_bagel.image_processing_bagel import patchify
from transformers_bagel.loading import module_name
from transformers_bagel.sequence import SequenceLayout, token_types_from_ids


CASE = CASES["train"][0]
KEY = CASE["key"]


@pytest.fixture(scope="module")
def packed(golden):
    """The golden sequence, given by its indices, as inputs of `forward`."""
    given = {name.removeprefix(f"{KEY}.in."): value for name, value in golden.items() if f"{KEY}.in." in name}
    model = load_model()
    tokens = sum(CASE["sample_lens"])
    input_ids = torch.full((1, tokens), -1)
    input_ids[0, given["packed_text_indexes"]] = given["packed_text_ids"]
    input_ids[0, given["packed_vae_token_indexes"]] = model.config.latent_token_id
    input_ids[0, given["packed_vit_token_indexes"]] = model.config.image_token_id
    labels = torch.full((1, tokens), -100)
    labels[0, given["ce_loss_indexes"] + 1] = given["packed_label_ids"]
    patch = model.config.latent_patch_size
    latents = [
        patchify(latent[:, : rows * patch, : columns * patch], patch)
        for latent, (rows, columns) in zip(given["padded_latent"], CASE["latent_shapes"], strict=True)
    ]
    ends = torch.tensor(CASE["latent_shapes"]).prod(-1).cumsum(0)
    vit_grids = [
        (item["vit_size"][1] // 14, item["vit_size"][0] // 14)
        for name in ("wide", "tall")
        for item in CASES["preprocess"]
        if item["image"] == name
    ]
    inputs = {
        "input_ids": input_ids,
        "pixel_values": given["packed_vit_tokens"],
        "image_grid_hw": torch.tensor(vit_grids),
        "latents": torch.cat(latents),
        "latent_grid_hw": torch.tensor(CASE["latent_shapes"]),
        "timesteps": given["packed_timesteps"].sigmoid()[ends - 1],
        "noise": golden[f"{KEY}.noise"],
        "labels": labels,
        "document_ids": torch.repeat_interleave(torch.arange(3), torch.tensor(CASE["sample_lens"])).unsqueeze(0),
    }
    return model, {name: value.to(DEVICE) for name, value in inputs.items()}, given


def test_losses_match(packed, golden):
    model, inputs, given = packed
    out = model(**inputs)
    clean, noise = inputs["latents"], inputs["noise"]
    noised = given["packed_timesteps"].sigmoid() > 0
    mse = (out.velocity - (noise - clean)).square()[noised]
    assert max_error(mse, golden[f"{KEY}.mse"]) <= 1e-4
    ce = torch.nn.functional.cross_entropy(
        out.logits[0, given["ce_loss_indexes"]], given["packed_label_ids"].to(DEVICE), reduction="none"
    )
    assert max_error(ce, golden[f"{KEY}.ce"]) <= 1e-4
    assert abs(out.ce_loss.item() - golden[f"{KEY}.ce"].mean().item()) <= 1e-4
    assert abs(out.mse_loss.item() - golden[f"{KEY}.mse"].mean().item()) <= 1e-4
    assert abs(out.loss.item() - CASE["loss"]) <= 1e-4


def test_gradients_match(packed, golden):
    model, inputs, _ = packed
    model.zero_grad()
    model(**inputs).loss.backward()
    parameters = dict(model.named_parameters())
    compared = 0
    for name, expected in golden.items():
        if f"{KEY}.grad." not in name:
            continue
        assert max_error(parameters[module_name(name.removeprefix(f"{KEY}.grad."))].grad, expected) <= 1e-4
        compared += 1
    assert compared > 20


def test_positions_match(packed):
    model, inputs, given = packed
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    assert seen["position_ids"][0].tolist() == given["packed_position_ids"].tolist()


def test_masks_match(packed, golden):
    """The masks that each sample is attended under."""
    model, inputs, _ = packed
    ids = inputs["input_ids"]
    types = token_types_from_ids(ids, model.config.image_token_id, model.config.latent_token_id)
    layout = SequenceLayout.from_inputs(
        types, inputs["image_grid_hw"], inputs["latent_grid_hw"], inputs["timesteps"], inputs["document_ids"]
    )
    masks = layout.sample_masks()
    assert [stop - start for start, stop, _ in masks] == CASE["sample_lens"]
    for sample, (_, _, mask) in enumerate(masks):
        assert torch.equal(mask, golden[f"{KEY}.mask.{sample}"] == 0)
