"""Samples become packed rows: what is learned, what conditions, where everything stands."""

from __future__ import annotations

import pytest

from diffusers_bagel.published import load_published_vae
from tests.conftest import CASES, CHECKPOINT, golden_image, max_error
from transformers_bagel import BagelDataCollator


CASE = CASES["train"][0]
KEY = CASE["key"]


@pytest.fixture(scope="session")
def vae():
    return load_published_vae(CHECKPOINT)


@pytest.fixture
def collate(processor, vae):
    """A collator without dropout, on the posterior's mean."""

    def make(**kwargs) -> BagelDataCollator:
        settings = {"vae_sample_mode": "argmax", "text_dropout": 0.0, "vit_dropout": 0.0, "vae_dropout": 0.0}
        return BagelDataCollator(processor, vae=vae, **(settings | kwargs))

    return make


def golden_samples() -> list[dict]:
    def part(item: dict) -> dict:
        return {**item, "image": golden_image(item["image"])} if "image" in item else item

    return [{"segments": [part(item) for item in sample]} for sample in CASE["samples"]]


def golden_messages() -> list[dict]:
    """The same samples as conversations."""
    square, wide, tall = (golden_image(name) for name in ("square", "wide", "tall"))
    texts = [item["text"] for sample in CASE["samples"] for item in sample if item["type"] == "text"]

    def turn(role: str, *parts) -> dict:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        return {"role": role, "content": content}

    return [
        {"messages": [turn("user", texts[0]), turn("assistant", square)]},
        {"messages": [turn("user", wide, texts[1]), turn("assistant", texts[2])]},
        {"messages": [turn("user", tall, texts[3]), turn("assistant", tall)]},
    ]


@pytest.mark.parametrize("samples", [golden_samples, golden_messages])
def test_golden_row(samples, collate, model, golden):
    given = {name.removeprefix(f"{KEY}.in."): value for name, value in golden.items() if f"{KEY}.in." in name}
    batch = collate()(samples())
    ids = batch["input_ids"][0]
    assert ids[given["packed_text_indexes"]].tolist() == given["packed_text_ids"].tolist()
    assert (ids == model.config.latent_token_id).nonzero().flatten().tolist() == given[
        "packed_vae_token_indexes"
    ].tolist()
    assert (ids == model.config.image_token_id).nonzero().flatten().tolist() == given[
        "packed_vit_token_indexes"
    ].tolist()
    assert batch["position_ids"][0].tolist() == given["packed_position_ids"].tolist()
    assert batch["document_ids"][0].bincount().tolist() == CASE["sample_lens"]
    assert batch["latent_grid_hw"].tolist() == CASE["latent_shapes"]
    learned = (batch["labels"][0] != -100).nonzero().flatten() - 1
    assert learned.tolist() == given["ce_loss_indexes"].tolist()
    assert max_error(batch["pixel_values"], given["packed_vit_tokens"]) <= 1e-6

    ends = batch["latent_grid_hw"].prod(-1).cumsum(0)
    levels = given["packed_timesteps"].sigmoid()[ends - 1]
    assert ((batch["timesteps"] > 0) == (levels > 0)).all()
    batch["timesteps"], batch["noise"] = levels, golden[f"{KEY}.noise"]
    out = model(**batch)
    assert abs(out.ce_loss.item() - golden[f"{KEY}.ce"].mean().item()) <= 1e-4
    assert abs(out.mse_loss.item() - golden[f"{KEY}.mse"].mean().item()) <= 1e-4
    assert abs(out.loss.item() - CASE["loss"]) <= 1e-4
