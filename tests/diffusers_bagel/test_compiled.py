"""A pipeline whose layers are compiled draws as before, in whatever order it is asked for whatever it can do."""

from __future__ import annotations

import pytest
import torch
from diffusers import FirstBlockCacheConfig, SeaCacheConfig

from tests.conftest import golden_image, max_error
from tests.diffusers_bagel.conftest import EDIT, PLAN, SMALL, seeded


@pytest.fixture
def compiled_pipe(own_pipe):
    torch._dynamo.reset()
    own_pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    yield own_pipe
    torch._dynamo.reset()


@pytest.mark.slow
def test_all_that_a_day_of_work_asks_for_compiles_in_full(compiled_pipe, pipe):
    """More graphs than torch allows for one function by default."""
    one, two = {"image": golden_image("wide")}, {"image": [golden_image("wide"), golden_image("tall")]}
    calls = [
        *(SMALL | {"prompt": prompt} for prompt in ("a", "a red circle", "two small yellow squares")),
        *(SMALL | {"prompt": ["a", "a red circle"]} | plan for plan in ({}, PLAN)),
        *(EDIT | {"prompt": "make it green"} | plan | images for plan in ({}, PLAN) for images in (one, two)),
        SMALL | {"prompt": "a", "height": 64, "num_images_per_prompt": 3},
    ]
    for settings in calls:
        images = [each(**settings, generator=seeded(0)).images for each in (compiled_pipe, pipe)]
        for found, expected in zip(*images, strict=True):
            assert max_error(found, expected) <= 1e-4


@pytest.mark.slow
def test_step_caches_leave_out_compiled_layers_and_take_no_further_graphs(own_pipe, pipe):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    own_pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    settings = SMALL | {"num_inference_steps": 6, "guidance_scale": 1.0}
    own_pipe("a red circle", generator=seeded(0), **settings)
    count = len(graphs)
    for config in (FirstBlockCacheConfig(0.1), SeaCacheConfig(0.3)):
        images = []
        for each in (own_pipe, pipe):
            each.enable_cache(config)
            images.append(each("a red circle", generator=seeded(0), **settings).images)
            each.disable_cache()
        assert max_error(*images) <= 1e-4
    assert len(graphs) == count
    torch._dynamo.reset()
