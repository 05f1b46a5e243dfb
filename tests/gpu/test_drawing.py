"""Pictures and texts are those of the CPU: drawing, edits, batches, threads, TaylorSeer, greedy texts; coarse types are finite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.conftest import max_error
from tests.gpu.common import BOUND, GPU, SMALL, drawn, edited, load_shapes


@pytest.mark.parametrize("draw", [drawn, edited])
def test_as_on_the_cpu(draw, on_cpu, on_gpu, agree):
    agree(draw(on_gpu), draw(on_cpu))


def test_batches(on_cpu, on_gpu, agree):
    texts = ["a", "a red circle", "two small yellow squares"]
    latents = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    agree(*(pipe(texts, latents=latents, **SMALL).images for pipe in (on_gpu, on_cpu)))


def test_threads_share_a_pipeline(on_gpu):
    settings = [{"num_inference_steps": steps, "guidance_scale": scale} for steps in (3, 5) for scale in (1.0, 4.0)]
    expected = [drawn(on_gpu, **item) for item in settings]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda item: drawn(on_gpu, **item), settings * 3))
    for place, image in enumerate(found):
        assert max_error(image, expected[place % len(settings)]) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_types_draw_finite_pictures(dtype):
    prompt = "a large red circle in the middle on a white background"
    assert load_shapes(dtype=dtype)(prompt, num_inference_steps=10, output_type="pt").images.isfinite().all()


def test_taylorseer(on_cpu, on_gpu, agree):
    found = []
    for pipe in (on_gpu, on_cpu):
        pipe.enable_taylorseer(interval=2, warmup_steps=2, max_order=2)
        found.append(drawn(pipe, num_inference_steps=10))
        pipe.disable_taylorseer()
    agree(*found)


def test_greedy_text_is_that_of_the_cpu(question, on_cpu, on_gpu):
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = on_cpu.transformer.generate(**question, **settings)
    assert on_gpu.transformer.generate(**question.to(GPU), **settings).tolist() == expected.tolist()
