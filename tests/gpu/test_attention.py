"""Attention by eager, flex and flash-attn gives the logits and velocities of sdpa, in float32 (not flash) and bfloat16."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.gpu.common import EDIT, GPU, SHAPES, SMALL, load, load_shapes, model_of, noise
from transformers_bagel import BagelForConditionalGeneration


needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
FLASH = pytest.param("flash_attention_2", marks=needs_flash)
# How much farther from float32 than sdpa in the same coarse type.
LIMIT = 1.5


def outputs(implementation: str, dtype: torch.dtype, question) -> dict[str, torch.Tensor]:
    """Of a question about a picture the logits; of a drawing and an edit what one step takes from the noise."""
    own = {"text_config": implementation, "vision_config": "sdpa"}
    model = model_of(dtype=dtype, attn_implementation=own).to(GPU)
    pipe = load(transformer=model).to(GPU)
    step = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 1.0}
    with torch.no_grad():
        logits = model(**question.to(GPU)).logits
    drawing = pipe("a red circle", latents=noise(), **(SMALL | step)).images
    edit = pipe("make it green", generator=torch.Generator().manual_seed(0), **(EDIT | step)).images
    return {name: value.float().cpu() for name, value in (("logits", logits), ("drawing", drawing), ("edit", edit))}


@pytest.fixture(autouse=True)
def uncompiled_on_a_cpu():
    """Its compiler would take minutes for flex attention."""
    if GPU.type == "cpu":
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@pytest.fixture(scope="module")
def by_sdpa():
    found: dict[torch.dtype, dict[str, torch.Tensor]] = {}

    def of(dtype: torch.dtype, question) -> dict[str, torch.Tensor]:
        if dtype not in found:
            found[dtype] = outputs("sdpa", dtype, question)
        return found[dtype]

    return of


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_float32(implementation, question, by_sdpa, agree):
    found, expected = outputs(implementation, torch.float32, question), by_sdpa(torch.float32, question)
    agree(*(torch.cat([value.flatten() for value in values.values()]) for values in (found, expected)), bound=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention", FLASH])
def test_bfloat16_is_as_close_to_float32_as_that_of_sdpa(implementation, question, by_sdpa, within):
    exact, rounded = (by_sdpa(dtype, question) for dtype in (torch.float32, torch.bfloat16))
    found = outputs(implementation, torch.bfloat16, question)
    within(max(((found[k] - exact[k]).norm() / (rounded[k] - exact[k]).norm()).item() for k in exact), LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", FLASH])
def test_the_tower_packs_images_in_bfloat16(implementation, within):
    """Of bagel-shapes, whose heads have a size that flash-attn takes."""
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((64, 64), (64, 32))]
    inputs = load_shapes().processor.image_processor(images, return_tensors="pt").to(GPU)

    def features(implementation: str, dtype: torch.dtype) -> torch.Tensor:
        own = {"text_config": "sdpa", "vision_config": implementation}
        model = BagelForConditionalGeneration.from_pretrained(SHAPES, dtype=dtype, attn_implementation=own).to(GPU)
        return model.get_image_features(**inputs).last_hidden_state.float()

    exact, rounded = (features("sdpa", dtype) for dtype in (torch.float32, torch.bfloat16))
    within(((features(implementation, torch.bfloat16) - exact).norm() / (rounded - exact).norm()).item(), LIMIT)
