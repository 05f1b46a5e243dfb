"""`/v1/images/generations` and `/v1/images/edits`, by the official client."""

from __future__ import annotations

import logging

import numpy as np
import openai
import pytest
import torch

from diffusers_bagel.few_steps import FewSteps
from tests.conftest import golden_image

from .conftest import SMALL, picture, png, session_of, wide


def drawn(pipe, content, seed: int, **settings):
    return (
        session_of(pipe)
        .send(
            content,
            output="image",
            generator=torch.Generator().manual_seed(seed),
            sanitize_control_tokens=True,
            vae_sample_mode="argmax",
            **settings,
        )
        .images[0]
    )


def test_pictures_are_what_sessions_draw(client, pipe):
    answer = client.images.generate(
        prompt="a red circle", n=2, size="64x48", extra_body={"num_inference_steps": 3, "seed": 7}
    )
    assert answer.size == "64x48" and answer.output_format == "png"
    for image, seed in zip(answer.data, (7, 8), strict=True):
        # Both are drawn in one loop, whose other shapes round otherwise.
        expected = np.asarray(drawn(pipe, "a red circle", seed, **SMALL), int)
        assert np.abs(np.asarray(picture(image.b64_json), int) - expected).max() <= 1
        assert image.seed == seed
    assert answer.usage.output_tokens == answer.usage.output_tokens_details.image_tokens == 24
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens


def test_several_images_are_edited_in_their_order(client, pipe):
    square = golden_image("square").convert("RGB")
    files = [("wide.png", png(wide())), ("square.png", png(square))]
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    answer = client.images.edit(image=files, prompt="join them", extra_body=settings | {"seed": 3})
    expected = drawn(pipe, [wide(), square, "join them"], 3, **settings)
    assert picture(answer.data[0].b64_json).tobytes() == expected.tobytes()
    assert answer.usage.input_tokens_details.image_tokens > 0
    one = client.images.edit(image=files[0], prompt="x", size="64x48", extra_body={"num_inference_steps": 2})
    assert picture(one.data[0].b64_json).size == (64, 48)


def test_an_edit_has_the_settings_that_are_lists(client, pipe):
    settings = SMALL | {"guidance_scale": 4.0}
    files, own = ("wide.png", png(wide())), {"cfg_interval": [0.0, 0.5], "seed": 3}
    answer = client.images.edit(image=files, prompt="x", extra_body=settings | own)
    expected = drawn(pipe, [wide(), "x"], 3, **settings, cfg_interval=(0.0, 0.5))
    assert picture(answer.data[0].b64_json).tobytes() == expected.tobytes()


def test_branches_of_guidance_are_held_as_a_request_says(client, pipe, forwards):
    settings, files = {"num_inference_steps": 8}, ("wide.png", png(wide()))
    expected = drawn(pipe, [wide(), "x"], 3, **settings, guidance_tolerance=0.05)
    seen = forwards(pipe)
    own = {"guidance_tolerance": 0.05, "seed": 3}
    answer = client.images.edit(image=files, prompt="x", extra_body=settings | own)
    assert picture(answer.data[0].b64_json).tobytes() == expected.tobytes()
    assert len(seen.branches) == 8 and sum(seen.branches) < 3 * 8


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_pictures_come_in_other_formats(output_format, client):
    answer = client.images.generate(prompt="x", output_format=output_format, output_compression=50, extra_body=SMALL)
    assert picture(answer.data[0].b64_json).format == output_format.upper()


@pytest.mark.parametrize("kind", ["image_generation", "image_edit"])
def test_partial_images_are_streamed_before_the_picture(kind, client):
    settings = {"prompt": "x", "partial_images": 2, "size": "64x48", "stream": True}
    settings["extra_body"] = {"num_inference_steps": 6, "seed": 1}
    if kind == "image_edit":
        events = list(client.images.edit(image=("wide.png", png(wide())), **settings))
    else:
        events = list(client.images.generate(**settings))
    partial = [event for event in events if event.type == f"{kind}.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert all(picture(event.b64_json).size == (64, 48) for event in partial)
    progress = [event for event in events if event.type == f"{kind}.progress"]
    assert [(event.step, event.steps) for event in progress] == [(step, 6) for step in range(6)]
    last = events[-1]
    assert last.type == f"{kind}.completed" and last.size == "64x48" and last.usage.output_tokens == 12


def test_partial_images_are_as_many_of_an_adapter_of_few_steps(client, pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer.config, "few_steps", FewSteps.of(pipe, 3).merged())
    events = list(client.images.generate(prompt="x", partial_images=2, size="64x48", stream=True))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["progress", "partial_image"] * 2 + ["progress", "completed"]
    tool = {"type": "image_generation", "size": "64x48", "partial_images": 1}
    asked = {"input": "x", "tools": [tool], "tool_choice": "required", "stream": True}
    kinds = [event.type.rpartition(".")[2] for event in client.responses.create(**asked)]
    assert kinds.count("partial_image") == 1


def test_what_is_asked_for_against_few_steps_is_told_once(client, pipe, monkeypatch, caplog):
    monkeypatch.setattr(pipe.transformer.config, "few_steps", FewSteps.of(pipe, 3).merged())
    logging.getLogger("diffusers").propagate = logging.getLogger("diffusers_bagel.few_steps").propagate = True
    client.images.generate(prompt="x", size="64x48", extra_body={"num_inference_steps": 2, "guidance_scale": 3.0})
    told = [record.getMessage() for record in caplog.records if record.name == "diffusers_bagel.few_steps"]
    assert [message.split(", and")[0] for message in told] == [
        "`guidance_scale` is 3",
        "The adapter was made for 3 steps",
    ]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"mask": png(wide())}, "mask"),
        ({"size": "1x1"}, "size"),
        ({"n": 100}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 2}, "partial_images"),
        ({"background": "transparent"}, "background"),
        ({"prompt": ""}, "prompt"),
        ({"model": "dall-e-2"}, "model"),
        ({"image": ("x.png", b"no picture")}, "image"),
        ({"image": [("x.png", png(wide()))] * 17}, "image"),
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"extra_body": {"num_inference_steps": "many"}}, "num_inference_steps"),
    ],
)
def test_what_is_wrong_is_refused_by_name(settings, param, client):
    with pytest.raises(openai.APIStatusError) as raised:
        client.images.edit(**({"image": ("wide.png", png(wide())), "prompt": "x"} | settings))
    assert raised.value.status_code == (404 if param == "model" else 400)
    assert raised.value.body["param"] == param
