"""A generator of the device gives its picture and its plan again; one of the CPU gives the picture of the CPU's noise."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import max_error
from tests.gpu.common import GPU, SMALL


@pytest.mark.parametrize("device", dict.fromkeys(("cpu", GPU.type)))
def test_a_generator_gives_its_picture_again_and_another_seed_another(device, on_gpu):
    first, again, other = (
        on_gpu("a", generator=torch.Generator(device).manual_seed(seed), **SMALL).images for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert max_error(first, other) > 0.01


def test_a_generator_of_the_cpu_gives_the_picture_of_its_noise(on_cpu, on_gpu, agree):
    latents = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    found = on_gpu("a", generator=torch.Generator().manual_seed(1), **SMALL).images
    agree(found, on_gpu("a", latents=latents, **SMALL).images, bound=0.0)
    agree(found, on_cpu("a", generator=torch.Generator().manual_seed(1), **SMALL).images)


@pytest.mark.parametrize("sampled", [False, True])
def test_plans_follow_generators_of_the_device(sampled, on_gpu):
    settings = SMALL | {"think": True, "max_think_tokens": 6, "do_sample": sampled, "temperature": 2.0}
    first, again = (on_gpu("a", generator=torch.Generator(GPU).manual_seed(1), **settings) for _ in range(2))
    assert first.texts == again.texts and torch.equal(first.images, again.images)
