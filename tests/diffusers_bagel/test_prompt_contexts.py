"""What the prompts of a call have in common is encoded and read once."""

from __future__ import annotations

import pytest
import torch

from diffusers_bagel import prompt_contexts
from tests.conftest import conversation, golden_image
from tests.diffusers_bagel.conftest import EDIT, PLAN, SMALL, TEXTS, assert_equals_single_runs, close, seeded


WORDS = ["make it green", "swap the two shapes", "make it green", "add a small yellow square to the left of it"]
ONE_IMAGE = [conversation(["@wide", text]) for text in WORDS]
MEAN = {"vae_sample_mode": "argmax"}


def reading(forwards, pipe, messages, **settings) -> list[dict]:
    seen = forwards(pipe)
    pipe(messages=messages, generator=seeded(*range(len(messages))), **settings)
    return seen.reading


@pytest.fixture
def encodings(pipe, monkeypatch) -> list[torch.Tensor]:
    """What the VAE encodes."""
    seen = []
    encode = pipe.vae.encode

    def watched(pixels, *args, **kwargs):
        seen.append(pixels)
        return encode(pixels, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "encode", watched)
    return seen


class TestResults:
    @pytest.mark.parametrize("settings", [{}, PLAN], ids=["draw", "think"])
    @pytest.mark.parametrize("mode", ["argmax", "sample"])
    def test_instructions_for_one_image(self, mode, settings, pipe):
        assert_equals_single_runs(pipe, ONE_IMAGE, vae_sample_mode=mode, **EDIT, **settings)

    def test_a_sampled_image_is_what_its_own_generator_makes_of_it(self, pipe, forwards):
        read = reading(forwards, pipe, ONE_IMAGE, **EDIT)
        (pixels,) = [
            segment.pixels for segment in pipe.encode_conversation(ONE_IMAGE[0]) if segment.segment.type == "vae_image"
        ]
        found = [call["latents"] for call in read if call.get("latents") is not None]
        assert len(found) == len(ONE_IMAGE)
        for index, latents in enumerate(found):
            assert torch.equal(latents, pipe.encode_image(pixels, seeded(index)))

    def test_the_same_prompt_several_times(self, pipe):
        assert_equals_single_runs(pipe, [conversation(["a red circle"])] * 3, **SMALL, **PLAN)

    def test_beginnings_of_several_lengths(self, pipe):
        image, more = ["@wide", "make it green"], ["@tall", "join them"]
        messages = [conversation(parts) for parts in (image, [*image, *more], [*image, *more, "and turn it"], ["x"])]
        assert_equals_single_runs(pipe, messages, **EDIT, **MEAN)


class TestForwards:
    def test_an_image_of_several_prompts_is_encoded_once(self, pipe, encodings):
        pipe(messages=ONE_IMAGE, generator=seeded(0, 1, 2, 3), **EDIT)
        assert len(encodings) == 1

    def test_an_image_that_differs_is_encoded_for_itself(self, pipe, encodings):
        images = [golden_image("wide"), golden_image("wide").rotate(180)]
        pipe(["a", "b"], image=[[image] for image in images], **EDIT)
        assert len(encodings) == 2

    def test_equal_latents_are_read_once_and_what_is_behind_them_together(self, pipe, forwards):
        read = reading(forwards, pipe, ONE_IMAGE, **EDIT, **MEAN)
        assert [call.get("latents") is not None for call in read] == [True, False, False]
        # Three different instructions, behind the image, and then without it.
        assert [len(call["input_ids"]) for call in read] == [1, 3, 3]

    def test_one_instruction_for_different_images_is_read_without_them_once(self, pipe, forwards):
        messages = [conversation([image, "make it green"]) for image in ("@wide", "@tall")]
        read = reading(forwards, pipe, messages, **EDIT)
        assert [(len(call["input_ids"]), call.get("latents") is not None) for call in read] == [
            *[(1, True), (1, True)],
            (1, False),
        ]

    def test_the_request_to_think_is_read_once(self, pipe, forwards):
        read = reading(forwards, pipe, [conversation([text]) for text in TEXTS[:3]], **SMALL, **PLAN)
        assert [len(call["input_ids"]) for call in read[:2]] == [1, 3]

    def test_a_beginning_that_spares_less_than_a_forward_is_read_with_the_rest(self, pipe, forwards):
        messages = [conversation(["a", text]) for text in TEXTS[:3]]
        assert [len(call["input_ids"]) for call in reading(forwards, pipe, messages, **SMALL)] == [3]

    def test_what_is_equal_has_one_buffer(self, pipe, forwards):
        seen = forwards(pipe)
        pipe(["a red circle"] * 3, generator=seeded(0, 1, 2), **SMALL)
        (call,) = {id(kwargs["past_key_values"]): kwargs for kwargs in seen.denoising[:1]}.values()
        views = call["past_key_values"].views
        assert len(views) == 6 and len({id(view.buffer) for view in views}) == 1


def test_pictures_without_sharing_are_the_same(pipe, monkeypatch):
    settings = EDIT | MEAN | {"generator": seeded(0, 1, 2, 3)}
    shared = pipe(messages=ONE_IMAGE, **settings).images
    monkeypatch.setattr(prompt_contexts, "FORWARD_COST", float("inf"))
    assert close(shared, pipe(messages=ONE_IMAGE, **(settings | {"generator": seeded(0, 1, 2, 3)})).images)
