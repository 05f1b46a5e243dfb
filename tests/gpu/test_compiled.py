"""Compiled by inductor it draws and writes the same: layers with fullgraph, two graphs for all prompts, static caches."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conftest import max_error
from tests.gpu.common import BOUND, GPU, SMALL, drawn, edited, load, needs_accelerator, noise


# A CPU's graphs are counted, and not built: its compiler would take minutes.
BACKEND = "eager" if GPU.type == "cpu" else "inductor"
PROMPTS = ("a", "a red circle", "a large green triangle beside two small circles")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled():
    pipe = load().to(GPU)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("draw", [drawn, edited])
def test_layers_draw_the_same(draw, compiled, on_gpu, agree):
    agree(draw(compiled), draw(on_gpu))


def test_all_prompts_share_the_graphs_of_the_first_two(compiled, on_gpu, within):
    errors, graphs = [], []
    for prompt in PROMPTS:
        settings = {"prompt": prompt, "latents": noise(), "guidance_scale": 1.0} | SMALL
        errors.append(max_error(*(pipe(**settings).images for pipe in (compiled, on_gpu))))
        graphs.append(counters["stats"]["unique_graphs"])
    within(max(errors), BOUND)
    assert graphs[1] == graphs[-1], graphs


@needs_accelerator
@pytest.mark.parametrize("inputs", ["text", "picture"])
def test_a_static_cache_which_the_library_compiles(inputs, question, on_gpu):
    model = on_gpu.transformer
    given = question.to(GPU) if inputs == "picture" else on_gpu.processor(text="a", return_tensors="pt").to(GPU)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**given, **settings)
    found = model.generate(**given, **settings, cache_implementation="static")
    assert found.tolist() == expected.tolist()
