"""Step caches of others, which run the layers of a model from a block of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import nn

from bagel_server import Engine
from diffusers_bagel import BagelPipeline, BagelSession
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


class TestDenoisingLayers:
    """`pipe.denoising_layers`, whose lists somebody replaces by one block each."""

    @pytest.fixture
    def blocks(self, pipe) -> Iterator[dict[str, AllLayers]]:
        layers = pipe.denoising_layers
        blocks = {name: AllLayers(getattr(layers, name)) for name in ("full", "no_text", "no_image")}
        forward = layers.forward

        def replaced(*args, **kwargs) -> torch.Tensor:
            with mock.patch.multiple(layers, **{name: nn.ModuleList([block]) for name, block in blocks.items()}):
                return forward(*args, **kwargs)

        layers.forward = replaced
        yield blocks
        layers.forward = forward
        assert not layers.is_replaced

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            (SMALL, {"full": 3, "no_text": 3, "no_image": 0}),
            (SMALL | {"think": True, "max_think_tokens": 4}, {"full": 3, "no_text": 3, "no_image": 0}),
            (EDIT | {"image": golden_image("wide")}, {"full": 3, "no_text": 3, "no_image": 3}),
        ],
        ids=["draw", "think", "edit"],
    )
    def test_each_branch_has_its_own_and_no_text_comes_through(self, settings, steps, pipe, blocks):
        found = pipe("a red circle", generator=seeded(0), **settings).images
        assert {name: block.step for name, block in blocks.items()} == steps
        pipe.denoising_layers.forward = pipe.denoising_layers.__class__.forward.__get__(pipe.denoising_layers)
        expected = pipe("a red circle", generator=seeded(0), **settings).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_layers_may_be_left_out_of_every_step_of_a_branch(self, pipe, blocks):
        settings = SMALL | {"think": True, "max_think_tokens": 4}
        plain = pipe("a red circle", generator=seeded(0), **settings)
        blocks["no_text"].warmup = 0
        skipped = pipe("a red circle", generator=seeded(0), **settings)
        assert skipped.texts == plain.texts
        assert not torch.equal(skipped.images, plain.images)

    def test_the_pictures_of_a_batch_share_the_state_of_a_branch(self, pipe, blocks):
        pipe(["a red circle", "many squares"], generator=seeded(0, 1), **SMALL)
        assert {name: block.step for name, block in blocks.items()} == {"full": 3, "no_text": 3, "no_image": 0}

    def test_drawings_in_turns_are_refused_and_an_engine_draws_one_after_the_other(self, pipe, blocks):
        settings = {"height": 48, "width": 64, "num_inference_steps": 3, "progress": True, "output": "image"}
        first, second = (BagelSession(pipe).stream("a red circle", **settings) for _ in range(2))
        next(first), next(second)
        with pytest.raises(RuntimeError, match="one after the other"):
            next(first)
        assert [event.type for event in second][-2:] == ["image", "done"]
        del settings["progress"]
        with Engine(pipe) as engine:
            answers = [engine.submit(BagelSession(pipe), "a red circle", **settings) for _ in range(2)]
            assert [len(answer.result(60).images) for answer in answers] == [1, 1]

    def test_a_second_cache_and_a_context_split_are_refused(self, pipe, blocks):
        with mock.patch.object(pipe, "_split_group", object()), pytest.raises(ValueError, match="context split"):
            pipe("a red circle", generator=seeded(0), **SMALL)
        pipe.enable_cache(FirstBlockCacheConfig())
        try:
            with pytest.raises(ValueError, match="Two step caches"):
                pipe("a red circle", **SMALL)
        finally:
            pipe.disable_cache()

    def test_layers_of_a_transformer_that_was_replaced_itself(self, own_pipe):
        before = own_pipe.denoising_layers
        own_pipe.transformer = copy.deepcopy(own_pipe.transformer)
        layers = own_pipe.denoising_layers
        assert layers is not before and layers is own_pipe.denoising_layers
        layers.forward = lambda *args, **kwargs: args[1]
        own_pipe.transformer = copy.deepcopy(own_pipe.transformer)
        with pytest.raises(ValueError, match="others than the transformer has now"):
            own_pipe("a red circle", **SMALL)

    @pytest.mark.parametrize("is_replaced", [False, True])
    def test_layers_of_which_one_was_replaced(self, is_replaced, own_pipe):
        before = own_pipe.denoising_layers
        if is_replaced:
            before.forward = lambda *args, **kwargs: args[1]
        layers = own_pipe.transformer.get_decoder().layers
        layers[1] = copy.deepcopy(layers[1])
        if is_replaced:
            with pytest.raises(ValueError, match="others than the transformer has now"):
                own_pipe("a red circle", **SMALL)
        else:
            assert own_pipe.denoising_layers.no_text[1] is layers[1]

    def test_layers_that_nobody_replaced_draw_as_without_them(self, own_pipe: BagelPipeline):
        expected = own_pipe("a red circle", generator=seeded(0), **SMALL).images
        assert not own_pipe.denoising_layers.is_replaced
        assert torch.equal(own_pipe("a red circle", generator=seeded(0), **SMALL).images, expected)
        assert set(own_pipe.components) == {"transformer", "vae", "scheduler", "processor"}
