"""Step caches of others, which run the layers of a model from a block of their own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from tests.conftest import golden_image
from tests.diffusers_bagel.conftest import EDIT, SMALL, seeded


class AllLayers(nn.Module):
    """As cache-dit's: one block in place of all, which hands on what it gets, and may leave out all but the first."""

    def __init__(self, layers: nn.ModuleList, warmup: int = 10**9):
        super().__init__()
        self.layers = layers
        self.warmup = warmup
        self.step = 0

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.step += 1
        for index, layer in enumerate(self.layers):
            if index == 0 or self.step <= self.warmup:
                hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states


@pytest.fixture
def in_one_block(pipe):
    """Draw with one block in the place of all layers."""

    def draw(warmup: int = 10**9, **kwargs) -> torch.Tensor:
        language_model = pipe.transformer.model.language_model
        block = AllLayers(language_model.layers, warmup)
        with mock.patch.object(language_model, "layers", nn.ModuleList([block])):
            return pipe("a red circle", generator=seeded(0), **kwargs).images

    return draw


@pytest.mark.parametrize(
    "settings",
    [SMALL, EDIT | {"image": golden_image("wide")}, SMALL | {"think": True, "max_think_tokens": 4}],
    ids=["draw", "edit", "think"],
)
def test_layers_that_are_all_given_the_same_take_their_own_part(settings, pipe, in_one_block):
    expected = pipe("a red circle", generator=seeded(0), **settings).images
    assert torch.equal(in_one_block(**settings), expected)


def test_layers_may_be_left_out_of_a_denoising_step(in_one_block):
    settings = SMALL | {"num_inference_steps": 4}
    skipped = in_one_block(warmup=3, **settings)
    assert skipped.isfinite().all()
    assert not torch.equal(skipped, in_one_block(**settings))


def test_layers_that_are_left_out_of_a_plan_are_an_error(in_one_block):
    """The words after that would be nonsense, without a word."""
    with pytest.raises(ValueError, match="warm-up"):
        in_one_block(warmup=3, **SMALL, think=True, max_think_tokens=8)
