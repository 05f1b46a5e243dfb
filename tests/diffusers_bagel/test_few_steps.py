"""Adapters of few steps: what their files say becomes the default of a drawing, and what is against it is said."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline, BagelSession
from diffusers_bagel.few_steps import FewSteps
from tests.conftest import load_model
from tests.diffusers_bagel.test_lora import make_pipe, save_peft
from tests.transformers_bagel.test_adapters import randomise


PROMPT = "a red circle"
SIZE = {"height": 32, "width": 32}
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """Of three steps."""
    folder = tmp_path_factory.mktemp("adapter")
    pipe = make_pipe()
    few_steps = FewSteps.of(pipe, 3)
    pipe.transformer.add_adapter(LoraConfig(r=4))
    randomise(pipe.transformer, 0)
    BagelPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        few_steps=few_steps,
    )
    return str(folder)


@pytest.fixture
def quick(adapter) -> BagelPipeline:
    pipe = make_pipe()
    pipe.load_lora_weights(adapter)
    return pipe


def steps_of(pipe: BagelPipeline, **settings) -> list[tuple[float, float]]:
    """Timestep and guidance scale of each step of a drawing."""
    seen = []

    def note(call, step, timestep, tensors):
        seen.append((round(float(timestep), 2), call.guidance_scale))
        return tensors

    pipe(PROMPT, **SIZE, generator=torch.Generator().manual_seed(0), callback_on_step_end=note, **settings)
    return seen


def drawn(pipe: BagelPipeline, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, **SIZE, generator=generator, output_type="latent", **settings).images


@pytest.fixture
def said(caplog):
    """Warnings of a test's own calls."""
    for name in ("diffusers_bagel.few_steps", "diffusers"):
        logging.getLogger(name).propagate = True
    caplog.set_level(logging.WARNING)
    return caplog


def test_loading_says_the_steps_and_scales_and_makes_them_the_defaults(adapter, said):
    pipe = make_pipe()
    pipe.load_lora_weights(adapter)
    assert "draws in 3 steps with guidance_scale=1 and image_guidance_scale=1" in said.text
    by_hand = {"num_inference_steps": 3, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    assert steps_of(pipe) == steps_of(pipe, **by_hand)
    assert len(steps_of(pipe)) == 3


def test_a_right_adapter_says_nothing_more(adapter, said):
    pipe = make_pipe()
    pipe.load_lora_weights(adapter)
    drawn(pipe)
    assert len(said.records) == 1


@pytest.mark.parametrize(
    ("settings", "count", "words"),
    [
        ({"num_inference_steps": 5}, 5, "made for 3 steps, and this call has 5"),
        ({"sigmas": [1.0, 0.5]}, 2, "made for 3 steps, and this call has 2"),
        ({"guidance_scale": 4.0}, 3, "`guidance_scale` is 4, and guidance is in the adapter's weights"),
        ({"image_guidance_scale": 2.0}, 3, "`image_guidance_scale` is 2, and guidance is in the adapter's weights"),
    ],
)
def test_what_is_given_by_hand_wins_and_is_warned_of(quick, said, settings, count, words):
    said.clear()
    steps = steps_of(quick, **settings)
    assert len(steps) == count
    assert steps[0][1] == settings.get("guidance_scale", 1.0)
    assert [words in record.getMessage() for record in said.records] == [True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_scale", "4"), ("image_guidance_scale", [1]), ("sigmas", 3), ("num_inference_steps", "5")],
)
def test_what_cannot_work_is_refused_as_without_the_adapter(quick, name, value):
    with pytest.raises(TypeError, match=f"^`{name}` must be"):
        drawn(quick, **{name: value})
    with pytest.raises(TypeError, match=f"^`{name}` must be"):
        BagelSession(quick).send(PROMPT, output="image", **{name: value})


def test_a_preset_keeps_the_adapters_steps(quick):
    assert steps_of(quick, preset="geneval") == steps_of(quick)


def test_sessions_draw_in_its_steps_and_previews_count_them(quick):
    session = BagelSession(quick)
    events = list(session.stream(PROMPT, output="image", preview_every=1, **SIZE))
    assert [event.type for event in events] == ["preview"] * 2 + ["image", "done"]


def test_without_the_adapter_the_defaults_are_what_they_were(quick):
    plain = steps_of(make_pipe())
    assert len(plain) == 49
    quick.disable_lora()
    assert steps_of(quick) == plain
    quick.enable_lora()
    assert len(steps_of(quick)) == 3
    quick.unload_lora_weights()
    assert steps_of(quick) == plain


def test_one_that_is_deleted_is_forgotten(quick, adapter):
    quick.delete_adapters("default_0")
    assert quick.few_steps is None


def test_only_the_active_adapter_counts(quick, tmp_path):
    quick.load_lora_weights(save_peft(tmp_path), adapter_name="plain")
    assert quick.few_steps is None
    quick.set_adapters("default_0")
    assert quick.few_steps.num_inference_steps == 3


def test_a_swapped_one_has_its_own_steps(quick, tmp_path):
    quick.load_lora_weights(save_peft(tmp_path, r=4, lora_alpha=4), adapter_name="default_0", hotswap=True)
    assert quick.few_steps is None


def test_fused_into_the_weights_it_keeps_its_steps(quick):
    expected = drawn(quick)
    quick.fuse_lora()
    quick.unload_lora_weights()
    assert (drawn(quick) - expected).abs().max() < 1e-4
    assert quick.few_steps.num_inference_steps == 3


def test_of_another_model_is_said(adapter, said):
    model = load_model()
    with torch.no_grad():
        model.model.llm2vae.weight += 0.1
    make_pipe(model).load_lora_weights(adapter)
    assert "made for a model with other weights" in said.text


def test_the_same_model_in_bfloat16_is_the_same(adapter, said):
    make_pipe(dtype=torch.bfloat16).load_lora_weights(adapter)
    assert "other weights" not in said.text


def test_of_another_shift_is_said(adapter, said):
    pipe = make_pipe()
    pipe.scheduler.register_to_config(shift=7.0)
    pipe.load_lora_weights(adapter)
    assert "made with a scheduler of shift=3; this one has 7" in said.text


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": "3"},
        {"sigmas": "three"},
        {"guidance_scale": None},
        {"base": [True]},
        {"colour": "red"},
    ],
    ids=str,
)
def test_broken_settings_are_refused_before_anything_is_loaded(adapter, tmp_path, changes):
    with safe_open(f"{adapter}/{NAME}", "pt") as file:
        stored = file.metadata()
    settings = json.loads(stored["lora_adapter_metadata"]) | {
        f"few_steps.{key}": item for key, item in changes.items()
    }
    stored["lora_adapter_metadata"] = json.dumps(settings)
    save_file(load_file(f"{adapter}/{NAME}"), tmp_path / NAME, metadata=stored)
    pipe = make_pipe()
    with pytest.raises(ValueError, match="settings of a few-step adapter are broken"):
        pipe.load_lora_weights(tmp_path)
    assert not getattr(pipe.transformer, "peft_config", {})
