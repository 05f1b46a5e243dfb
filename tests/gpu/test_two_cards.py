"""Spread over two cards it draws what one draws: components over cards, and the layers of one model."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.common import GPU, drawn, edited, load, model_of, needs_cuda


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@needs_cuda
@pytest.mark.parametrize("draw", [drawn, edited])
def test_a_balanced_map_of_the_pipeline(draw, on_gpu, agree):
    """On one card, too."""
    agree(draw(load(device_map="balanced")), draw(on_gpu))


@needs_two
@pytest.mark.parametrize("draw", [drawn, edited])
def test_a_model_whose_layers_lie_on_two_cards(draw, on_gpu, agree):
    first = ("model.language_model.embed_tokens", "model.language_model.layers.0", "model.language_model.rotary_emb")
    model = model_of(device_map={"": 1} | dict.fromkeys(first, 0))
    pipe = load(transformer=model)
    pipe.vae.to(GPU)
    agree(draw(pipe), draw(on_gpu))


@needs_two
def test_a_pipeline_on_the_second_card(on_gpu, agree):
    agree(drawn(load().to("cuda:1")), drawn(on_gpu))
