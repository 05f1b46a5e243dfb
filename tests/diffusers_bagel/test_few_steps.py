"""Adapters of few steps: what their files say becomes the default of a drawing, and what is against it is said."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_bagel import BagelPipeline, BagelSession
from diffusers_bagel.few_steps import FewSteps
from diffusers_bagel.inferencer import InterleaveInferencer
from diffusers_bagel.lora import lora_config
from tests.conftest import load_model, load_processor, max_error
from tests.diffusers_bagel.test_lora import make_pipe, save_peft
from tests.transformers_bagel.test_adapters import randomise


PROMPT = "a red circle"
SIZE = {"height": 32, "width": 32}
NAME = "pytorch_lora_weights.safetensors"
LORA = LoraConfig(r=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """Of three steps."""
    return save_adapter(tmp_path_factory.mktemp("adapter"), 3)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> str:
    """Another one, of two steps."""
    return save_adapter(tmp_path_factory.mktemp("adapter"), 2)


def save_adapter(folder, num_steps: int) -> str:
    pipe = make_pipe()
    few_steps = FewSteps.of(pipe, num_steps)
    pipe.transformer.add_adapter(LoraConfig(r=4))
    randomise(pipe.transformer, num_steps)
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
        ({"sigmas": [1.0, 0.6, 0.3]}, 3, "`sigmas` are 1, 0.6, 0.3, and the adapter was made for 1, 0.667, 0.333"),
        ({"timestep_shift": 7.0}, 3, "shift of the noise levels is 7.0, and the adapter was made with 3"),
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
    [
        ("guidance_scale", "4"),
        ("image_guidance_scale", [1]),
        ("sigmas", 3),
        ("num_inference_steps", "5"),
        ("timestep_shift", "3"),
    ],
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


def test_fused_into_the_weights_it_keeps_its_steps_and_in_files_too(quick, tmp_path):
    expected = drawn(quick)
    quick.fuse_lora()
    quick.unload_lora_weights()
    assert (drawn(quick) - expected).abs().max() < 1e-4
    quick.save_pretrained(tmp_path)
    read = BagelPipeline.from_pretrained(tmp_path, processor=load_processor())
    read.set_progress_bar_config(disable=True)
    assert steps_of(read) == steps_of(quick)
    assert (drawn(read) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda pipe: (pipe.fuse_lora(), pipe.disable_lora()), 49),
        (lambda pipe: (pipe.fuse_lora(), pipe.disable_lora(), pipe.enable_lora()), 3),
        (lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora(), pipe.unload_lora_weights()), 49),
        (lambda pipe: (pipe.fuse_lora(adapter_names=["two"]), pipe.unload_lora_weights()), 2),
        (lambda pipe: pipe.fuse_lora(lora_scale=0.0), 49),
        (lambda pipe: (pipe.fuse_lora(lora_scale=0.0), pipe.unload_lora_weights()), 49),
        (lambda pipe: pipe.set_adapters("three", 0.0), 49),
        (lambda pipe: pipe.set_adapters(["two", "three"], [0.0, 1.0]), 3),
        (lambda pipe: pipe.set_adapters(["two", "three"]), 2),
        (lambda pipe: (pipe.fuse_lora(), pipe.unload_lora_weights(), pipe.load_lora_weights(pipe.others)), 2),
        (
            lambda pipe: (
                *(pipe.fuse_lora(), pipe.unload_lora_weights(), pipe.load_lora_weights(pipe.others)),
                *(pipe.fuse_lora(), pipe.unfuse_lora(), pipe.unload_lora_weights()),
            ),
            3,
        ),
        (lambda pipe: (pipe.transformer.delete_adapter("three"), pipe.transformer.add_adapter(LORA, "three")), 49),
    ],
    ids=[
        "fused and disabled",
        "enabled again",
        "unfused",
        "another one fused",
        "fused by nothing",
        "and unloaded",
        "of weight 0",
        "beside one of weight 0",
        "two at once",
        "another one behind what was fused",
        "fused and unfused there",
        "another one of its name",
    ],
)
def test_what_is_drawn_with_decides(change, steps, adapter, of_two):
    pipe = make_pipe()
    pipe.others = of_two
    pipe.load_lora_weights(of_two, adapter_name="two")
    pipe.load_lora_weights(adapter, adapter_name="three")
    change(pipe)
    assert len(steps_of(pipe)) == steps


def test_a_scale_of_0_in_a_call_leaves_the_plain_model(quick):
    plain = steps_of(make_pipe())
    assert steps_of(quick, attention_kwargs={"scale": 0.0}) == plain
    assert len(steps_of(quick, attention_kwargs={"scale": 0.5})) == 3
    session = BagelSession(quick)
    settings = {"attention_kwargs": {"scale": 0.0}, "preview_every": 1, **SIZE}
    assert sum(event.type == "preview" for event in session.stream(PROMPT, output="image", **settings)) == 48


def test_a_scale_of_0_leaves_what_is_fused(quick):
    quick.fuse_lora()
    assert len(steps_of(quick, attention_kwargs={"scale": 0.0})) == 3


def test_a_scale_of_0_is_of_one_call_alone(quick):
    """peft has one number a layer, which is that of a call while it is in its forwards."""
    found = []

    def ask(*_) -> None:
        found.append(pool.submit(lambda: quick.few_steps))
        wait(found, timeout=0.05)

    with ThreadPoolExecutor() as pool:
        quick.transformer.register_forward_pre_hook(ask)
        drawn(quick, attention_kwargs={"scale": 0.0}, num_inference_steps=2)
        assert found and all(asked.result() is not None for asked in found)


def test_what_a_forward_calls_back_may_ask_for_them(quick):
    quick.transformer.register_forward_pre_hook(lambda *_: asked.append(quick.few_steps))
    asked: list[FewSteps | None] = []
    thread = threading.Thread(target=drawn, args=(quick,), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and asked[-1] == quick.few_steps


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: (pipe.fuse_lora(), pipe.set_adapters("x", 0.0)),
        lambda pipe: (pipe.fuse_lora(lora_scale=0.0), pipe.set_adapters("x", 1.0)),
        lambda pipe: (pipe.fuse_lora(), pipe.set_adapters("x", 0.0), pipe.fuse_lora()),
        lambda pipe: (pipe.fuse_lora(lora_scale=0.0), pipe.unfuse_lora(), pipe.fuse_lora()),
        lambda pipe: (pipe.fuse_lora(), pipe.delete_adapters("x")),
        lambda pipe: (pipe.fuse_lora(lora_scale=0.0), pipe.delete_adapters("x")),
        lambda pipe: (pipe.fuse_lora(), pipe.transformer.delete_adapter("x")),
        lambda pipe: (pipe.set_adapters("x", 0.0), pipe.fuse_lora(), pipe.unload_lora_weights()),
        lambda pipe: pipe.delete_adapters("x"),
    ],
    ids=[
        "weight 0 later",
        "weight 1 later",
        "fused again",
        "fused by 0 before",
        "deleted",
        "nothing fused, deleted",
        "by the model",
        "weight 0",
        "off",
    ],
)
@pytest.mark.parametrize("is_unloaded", [False, True], ids=["", "unloaded"])
def test_the_steps_are_those_of_what_is_in_the_weights(change, is_unloaded, adapter):
    by_hand = {"num_inference_steps": 3, "guidance_scale": 1.0}
    pipe = make_pipe()
    plain = drawn(pipe, **by_hand)
    pipe.load_lora_weights(adapter, adapter_name="x")
    change(pipe)
    if is_unloaded:
        pipe.unload_lora_weights()
    is_adapted = max_error(drawn(pipe, **by_hand), plain) > 1e-2
    assert len(steps_of(pipe)) == (3 if is_adapted else 49)


def test_what_goes_unfused_beside_a_fused_one_leaves_nothing(adapter, tmp_path):
    plain = save_peft(tmp_path, target_modules=r".*mlp\.down_proj")
    pipe = make_pipe()
    pipe.load_lora_weights(plain, adapter_name="plain")
    pipe.load_lora_weights(adapter, adapter_name="three")
    pipe.set_adapters(["plain", "three"])
    pipe.fuse_lora(adapter_names=["plain"])
    pipe.unload_lora_weights()
    assert pipe.transformer.config.few_steps is None and len(steps_of(pipe)) == 49


def test_the_models_own_swap_takes_the_steps_away(quick, tmp_path):
    weights, metadata = BagelPipeline.lora_state_dict(
        save_peft(tmp_path, r=4, lora_alpha=4), return_lora_metadata=True
    )
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    config = lora_config(weights, metadata, None)
    quick.transformer.load_adapter(
        adapter_name="default_0", adapter_state_dict=weights, peft_config=config, hotswap=True
    )
    assert quick.few_steps is None


def test_loaded_into_a_transformer_it_has_its_steps(adapter):
    pipe = make_pipe()
    weights, metadata = BagelPipeline.lora_state_dict(adapter, return_lora_metadata=True)
    BagelPipeline.load_lora_into_transformer(weights, pipe.transformer, metadata=metadata)
    assert len(steps_of(pipe)) == 3


@pytest.mark.parametrize("settings", [{}, {"colour": 1}, {"sigmas": [1.0]}, {"timestep_shift": "3"}], ids=str)
def test_a_model_with_broken_settings_makes_no_pipeline(settings, quick):
    right = quick.few_steps.merged()
    model = load_model()
    model.config.few_steps = right | settings if settings else settings
    with pytest.raises(ValueError, match="`config.few_steps` of the transformer: the settings of a few-step adapter"):
        make_pipe(model)


def test_a_fuse_that_fails_changes_nothing(quick):
    with pytest.raises(ValueError, match="vae"):
        quick.fuse_lora(components=["vae"])
    quick.disable_lora()
    assert quick.few_steps is None


def test_two_at_once_are_said(quick, of_two, said):
    quick.load_lora_weights(of_two, adapter_name="two")
    said.clear()
    quick.set_adapters(["two", "default_0"])
    assert "'two', 'default_0' were each made for few steps: drawings have those of 'two'" in said.text


def test_one_that_is_swapped_in_without_being_active_says_so(quick, of_two, said):
    quick.load_lora_weights(of_two, adapter_name="two")
    quick.load_lora_weights(of_two, adapter_name="default_0", hotswap=True)
    assert "'default_0' draws in 2 steps" in said.text and "are the defaults where it is active" in said.text


def test_other_pipelines_of_the_model_and_its_generate_draw_alike(quick):
    expected = drawn(quick)
    for pipe in (BagelPipeline(**quick.components), BagelPipeline.from_pipe(quick)):
        assert torch.equal(drawn(pipe), expected)
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    inputs = quick.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    pictures = [
        quick.transformer.generate(
            **inputs, generation_mode="image", generator=torch.Generator().manual_seed(0), **SIZE, **settings
        )
        for settings in ({}, {"num_inference_steps": 3, "guidance_scale": 1.0})
    ]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_timesteps": 4, "cfg_text_scale": 1.0}, []),
        ({"num_timesteps": 6, "cfg_text_scale": 1.0}, ["for 3 steps, and this call has 5"]),
        ({"num_timesteps": 4, "cfg_text_scale": 4.0, "cfg_img_scale": 1.0}, ["`guidance_scale` is 4"]),
    ],
    ids=["as it was made", "steps", "guidance"],
)
def test_the_published_interface_keeps_its_own_settings_and_warns(settings, words, quick, said):
    said.clear()
    InterleaveInferencer(quick)(text=PROMPT, image_shapes=(32, 32), **settings)
    messages = [record.getMessage() for record in said.records]
    assert len(messages) == len(words) and all(map(str.__contains__, messages, words)), messages


def test_saved_by_the_model_itself_it_says_that_its_steps_are_lost(quick, tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    quick.transformer.save_pretrained(tmp_path)
    assert "Not saved: " in caplog.text and "the steps that it was made for" in caplog.text


def test_of_another_model_is_said(adapter, said):
    model = load_model()
    with torch.no_grad():
        model.model.llm2vae.weight += 0.1
    make_pipe(model).load_lora_weights(adapter)
    assert "made for a model with other weights" in said.text


def test_the_same_model_in_bfloat16_is_the_same(adapter, said):
    make_pipe(dtype=torch.bfloat16).load_lora_weights(adapter)
    assert "other weights" not in said.text


def test_of_another_shift_is_said_and_its_own_is_drawn_with(quick, adapter, said):
    pipe = make_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=7.0)
    pipe.load_lora_weights(adapter)
    assert "made with a scheduler of shift=3; this one has 7.0: drawings get the adapter's" in said.text
    assert steps_of(pipe) == steps_of(quick)


def test_another_scheduler_keeps_what_it_can_and_says_what_not(quick, said):
    expected = steps_of(quick)
    quick.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert steps_of(quick) == expected
    quick.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    said.clear()
    assert {scale for _, scale in steps_of(quick)} == {1.0}
    assert [record.getMessage().split(", and")[0] for record in said.records] == [
        "FlowMatchHeunDiscreteScheduler makes its own `sigmas`"
    ]


@pytest.mark.parametrize("layer", ["layers.1.mlp_moe_gen.down_proj", "layers.0.self_attn.q_proj"])
def test_of_a_model_of_which_one_layer_differs_is_said(layer, adapter, said):
    """As where a LoRA of few layers was merged."""
    model = load_model()
    with torch.no_grad():
        model.get_submodule(f"model.language_model.{layer}").weight *= 1.1
    make_pipe(model).load_lora_weights(adapter)
    assert "made for a model with other weights" in said.text


@pytest.mark.parametrize("change", [1.0, 1.05])
@pytest.mark.parametrize("kind", ["plain", "beside another adapter", "compiled", "float16"])
def test_the_model_is_compared_as_it_is_without_adapters_in_any_form(kind, change, adapter, said):
    model = load_model(dtype=torch.float16 if kind == "float16" else torch.float32)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight *= change
    pipe = make_pipe(model)
    if kind == "beside another adapter":
        pipe.load_lora_weights(adapter, adapter_name="another")
        said.clear()
    if kind == "compiled":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.load_lora_weights(adapter)
    assert ("other weights" in said.text) == (change != 1)


def test_weights_of_one_byte_tell_nothing_of_their_model(adapter, said):
    pipe = make_pipe()
    pipe.enable_layerwise_casting()
    pipe.load_lora_weights(adapter)
    assert "draws in 3 steps" in said.text and "other weights" not in said.text


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload("cpu", num_blocks_per_group=2),
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    ],
    ids=["layers", "groups", "model"],
)
def test_offloaded_it_loads_and_knows_its_model(enable, adapter, said, monkeypatch):
    # accelerate 1.15 cannot offload any model to "cpu:0", the name that diffusers gives this stand-in for a GPU.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **kw: offload(model, "cpu", **kw))
    models = load_model(), load_model()
    with torch.no_grad():
        models[1].model.language_model.layers[1].self_attn.k_proj_moe_gen.weight += 0.1
    for model, is_other in zip(models, (False, True), strict=True):
        pipe = make_pipe(model)
        enable(pipe)
        said.clear()
        pipe.load_lora_weights(adapter)
        assert len(steps_of(pipe)) == 3
        assert ("other weights" in said.text) == is_other


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 4},
        {"num_inference_steps": "3"},
        {"sigmas": "three"},
        {"guidance_scale": None},
        {"num_inference_steps": 3.0},
        {"sigmas": [0.2, 0.5, 0.9]},
        {"sigmas": [3.0, 2.0, 1.0]},
        {"guidance_scale": -3.0},
        {"image_guidance_scale": float("nan")},
        {"timestep_shift": 0},
        {"base": [True]},
        {"base": {"llm2vae": 1.0}},
        {"base": {"llm2vae": ["a"]}},
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
