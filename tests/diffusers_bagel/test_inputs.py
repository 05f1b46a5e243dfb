"""Images and numbers in whatever type a program has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import golden_image
from tests.diffusers_bagel.conftest import EDIT, seeded


PROMPTS = ["make it green", "make it blue"]
PICTURES = [golden_image("wide").convert("RGB"), golden_image("wide").convert("RGB").rotate(180)]
BYTES = np.stack([np.asarray(picture) for picture in PICTURES])
TENSOR = torch.from_numpy(BYTES).permute(0, 3, 1, 2) / 255


def edited(pipe, prompt, image, **settings) -> torch.Tensor:
    seeds = range(1 if isinstance(prompt, str) else len(prompt))
    arguments = EDIT | {"vae_sample_mode": "argmax", "height": 32, "width": 32} | settings
    return pipe(prompt, image=image, generator=seeded(*seeds), **arguments).images


@pytest.fixture(scope="module")
def of_pairs(pipe) -> torch.Tensor:
    return edited(pipe, PROMPTS, [[picture] for picture in PICTURES])


@pytest.mark.parametrize(
    "image",
    [
        PICTURES,
        tuple(PICTURES),
        [PICTURES[0], [PICTURES[1]]],
        BYTES,
        BYTES / 255,
        TENSOR,
        list(TENSOR),
        list(TENSOR[:, None]),
    ],
    ids=["list", "tuple", "mixed", "bytes", "array", "tensor", "list of tensors", "list of batches of one"],
)
def test_as_many_images_as_prompts_are_pairs(image, pipe, of_pairs):
    assert torch.equal(edited(pipe, PROMPTS, image), of_pairs)


@pytest.mark.parametrize("image", [BYTES, TENSOR, [TENSOR]], ids=["array", "tensor", "batch in a list"])
def test_a_batch_with_one_prompt_is_several_images_of_it(image, pipe):
    assert torch.equal(edited(pipe, "join them", image), edited(pipe, "join them", PICTURES))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_what_the_pipeline_drew_is_an_image_for_it(output_type, pipe):
    drawn = {kind: edited(pipe, PROMPTS, None, output_type=kind, guidance_scale=1.0) for kind in {"pil", output_type}}
    assert torch.equal(edited(pipe, PROMPTS, drawn[output_type]), edited(pipe, PROMPTS, drawn["pil"]))


def test_an_image_in_bfloat16_is_read(pipe):
    rounded = TENSOR[0].bfloat16()
    assert torch.equal(edited(pipe, "x", rounded), edited(pipe, "x", rounded.float()))


KINDS = {
    "numpy": (np.int64, np.float32),
    "numpy small": (np.uint8, np.float16),
    "numpy without axes": (np.array, np.array),
    "torch": (torch.tensor, torch.tensor),
    "torch small": (
        lambda value: torch.tensor(value, dtype=torch.uint8),
        lambda value: torch.tensor(value, dtype=torch.bfloat16),
    ),
}
WHOLE = {"height": 32, "width": 48, "max_think_tokens": 4, "num_images_per_prompt": 1, "num_inference_steps": 2}
NUMBERS = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "cfg_renorm_min": 0.5, "temperature": 0.5}
NUMBERS |= {"guidance_tolerance": 0.0625}
SERIES = {"cfg_interval": (0.25, 1.0), "sigmas": [1.0, 0.5]}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_and_torch_are_numbers(kind, pipe):
    whole, number = KINDS[kind]
    settings = WHOLE | NUMBERS | SERIES
    expected = edited(pipe, "x", PICTURES[0], think=True, **settings)
    given = {name: whole(value) for name, value in WHOLE.items()}
    given |= {name: number(value) for name, value in NUMBERS.items()}
    given |= {name: type(values)(map(number, values)) for name, values in SERIES.items()}
    assert torch.equal(edited(pipe, "x", PICTURES[0], think=True, **given), expected)


@pytest.mark.parametrize("series", [np.array, torch.tensor])
def test_a_series_may_be_an_array(series, pipe):
    given = {name: series(values) for name, values in SERIES.items()}
    assert torch.equal(edited(pipe, "x", None, **given), edited(pipe, "x", None, **SERIES))


def test_settings_of_caching_may_be_numpys(own_pipe):
    drawn = []
    for number in (int, np.int64, torch.tensor):
        own_pipe.enable_taylorseer(interval=number(2), warmup_steps=number(1), max_order=number(1))
        drawn.append(edited(own_pipe, "x", None, num_inference_steps=5))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
