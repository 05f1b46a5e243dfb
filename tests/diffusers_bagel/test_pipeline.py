"""What the pipeline promises beyond the golden numbers."""

from __future__ import annotations

import copy
import io

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForText2Image, FlowMatchEulerDiscreteScheduler

from diffusers_bagel import BagelPipeline
from diffusers_bagel.guidance import EDITING
from tests.conftest import CHECKPOINT, conversation, golden_image, max_error, phone_photo
from tests.diffusers_bagel.conftest import EDIT, SMALL, encoded, seeded


class TestGuidance:
    def test_guidance_is_alive(self, pipe):
        weak = pipe("a red circle", guidance_scale=1.0, generator=seeded(1), **SMALL).images
        strong = pipe("a red circle", guidance_scale=4.0, generator=seeded(1), **SMALL).images
        assert max_error(weak, strong) > 1e-2

    def test_image_guidance_is_alive(self, pipe):
        images = [
            pipe("x", image=golden_image("square"), image_guidance_scale=scale, generator=seeded(1), **EDIT).images
            for scale in (1.0, 2.0)
        ]
        assert max_error(*images) > 1e-3

    def test_text_scale_of_one_turns_the_image_scale_off(self, pipe):
        settings = EDIT | {"image": golden_image("square"), "guidance_scale": 1.0}
        images = [
            pipe("x", image_guidance_scale=scale, generator=seeded(1), **settings).images for scale in (1.0, 3.0)
        ]
        assert torch.equal(*images)

    def test_presets_follow_the_task(self, pipe):
        drawn = [
            pipe("x", generator=seeded(1), **SMALL, **preset).images
            for preset in ({}, {"image_guidance_scale": 1.0, "cfg_interval": (0.4, 1.0), "cfg_renorm_type": "global"})
        ]
        assert torch.equal(*drawn)
        preset = {"image_guidance_scale": 2.0, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
        edited = [
            pipe("x", image=golden_image("square"), generator=seeded(1), **EDIT, **settings).images
            for settings in ({}, preset)
        ]
        assert torch.equal(*edited)

    @pytest.mark.parametrize(
        ("interval", "branches"), [((0.0, 1.0), 8), ((0.6, 1.0), 7), ((0.6, 0.95), 6), ((0, 0), 4)]
    )
    def test_forwards_follow_the_interval(self, pipe, interval, branches, forwards):
        seen = forwards(pipe)
        pipe("x", **(SMALL | {"num_inference_steps": 4}), cfg_interval=interval)
        assert sum(seen.branches) == branches

    def test_original_text_to_image_preset_takes_90_forwards_and_editing_147(self, pipe, forwards):
        seen = forwards(pipe)
        pipe("x", height=16, width=16, output_type="latent")
        assert sum(seen.branches) == 90
        seen.denoising.clear()
        pipe("x", image=golden_image("square"), height=16, width=16, output_type="latent")
        assert sum(seen.branches) == 147

    def test_a_last_image_moves_the_text_free_context_on(self, pipe):
        prompts = [
            encoded(pipe, conversation(items)) for items in (["make it like", "@square"], ["@square", "bigger"])
        ]
        contexts, plans = pipe.prepare_contexts(prompts, [EDITING] * 2)
        assert plans is None
        assert contexts[0]["no_text"] is contexts[0]["full"]
        assert contexts[1]["no_text"].length == contexts[1]["full"].length - contexts[1]["no_image"].length


class TestSeeds:
    def test_equal_seeds_give_equal_images_and_a_second_request_honours_its_own(self, pipe):
        first = pipe("x", generator=seeded(1), **SMALL).images
        second = pipe("x", generator=seeded(2), **SMALL).images
        assert torch.equal(pipe("x", generator=seeded(1), **SMALL).images, first)
        assert max_error(first, second) > 1e-2

    def test_noise_is_drawn_in_packed_order(self, pipe, forwards):
        seen = forwards(pipe)
        pipe("x", generator=seeded(5), **SMALL)
        expected = torch.randn(12, 16, generator=seeded(5))
        assert torch.equal(seen.denoising[0]["latents"][:12], expected)

    def test_sampled_plans_follow_the_seed_and_leave_the_global_state(self, pipe):
        settings = SMALL | {"think": True, "max_think_tokens": 12, "do_sample": True, "temperature": 1.0}
        state = torch.random.get_rng_state()
        texts = [pipe("x", generator=seeded(seed), **settings).texts[0] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_the_posterior_is_sampled_from_the_generator(self, pipe):
        settings = EDIT | {
            "image": golden_image("square"),
            "num_inference_steps": 1,
            "latents": torch.zeros(1, 16, 16),
        }
        same = [pipe("x", generator=seeded(seed), **settings).images for seed in (1, 1, 2)]
        assert torch.equal(same[0], same[1])
        assert max_error(same[0], same[2]) > 0
        means = [pipe("x", generator=seeded(s), vae_sample_mode="argmax", **settings).images for s in (1, 2)]
        assert torch.equal(*means)


class TestTaylorSeer:
    def test_the_state_is_dropped_after_each_call(self, own_pipe):
        settings = SMALL | {"num_inference_steps": 12}
        plain = own_pipe("x", generator=seeded(1), **settings).images
        own_pipe.enable_taylorseer()
        first = own_pipe("x", generator=seeded(1), **settings).images
        second = own_pipe("x", generator=seeded(1), **settings).images
        assert torch.equal(first, second)
        assert max_error(first, plain) > 0
        own_pipe.disable_taylorseer()
        assert torch.equal(own_pipe("x", generator=seeded(1), **settings).images, plain)

    def test_49_steps_take_36_forwards_instead_of_90(self, own_pipe, forwards):
        own_pipe.enable_taylorseer()
        seen = forwards(own_pipe)
        own_pipe("x", height=16, width=16, output_type="latent")
        assert sum(seen.branches) == 36

    def test_batch_equals_single(self, own_pipe):
        own_pipe.enable_taylorseer(interval=2, warmup_steps=3, max_order=2)
        settings = SMALL | {"num_inference_steps": 8}
        batch = own_pipe(["a", "b c d"], generator=seeded(1, 2), **settings).images
        for index, prompt in enumerate(["a", "b c d"]):
            assert max_error(batch[index], own_pipe(prompt, generator=seeded(index + 1), **settings).images[0]) <= 1e-5


class TestOutputs:
    @pytest.mark.parametrize(
        ("output_type", "kind", "shape"),
        [
            ("np", np.ndarray, (1, 48, 64, 3)),
            ("pt", torch.Tensor, (1, 3, 48, 64)),
            ("latent", torch.Tensor, (1, 12, 16)),
        ],
    )
    def test_output_types(self, pipe, output_type, kind, shape):
        images = pipe("x", **(SMALL | {"output_type": output_type})).images
        assert isinstance(images, kind)
        assert tuple(images.shape) == shape

    def test_pil_images_have_the_size_asked_for(self, pipe):
        images = pipe(["x", "y"], **(SMALL | {"output_type": "pil"})).images
        assert [image.size for image in images] == [(64, 48)] * 2
        assert isinstance(images[0], PIL.Image.Image)

    def test_an_edit_has_the_resized_size_of_its_last_image(self, pipe):
        image = pipe("x", image=[golden_image("square"), golden_image("wide")], num_inference_steps=1).images[0]
        assert image.size == (128, 80)

    def test_tuple_and_output_agree(self, pipe):
        images, texts = pipe("x", generator=seeded(1), return_dict=False, **SMALL)
        out = pipe("x", generator=seeded(1), **SMALL)
        assert torch.equal(images, out.images)
        assert texts is None and out.texts is None

    def test_output_latents_start_a_run_again(self, pipe):
        noise = torch.randn(1, 12, 16, generator=seeded(3))
        assert torch.equal(pipe("x", latents=noise, **SMALL).images, pipe("x", generator=seeded(3), **SMALL).images)

    def test_mixed_sizes_come_as_a_list_in_every_type(self, pipe):
        images = [[golden_image("wide")], [golden_image("tall")]]
        for output_type, sizes in (("pil", [(128, 80), (64, 112)]), ("np", [(80, 128, 3), (112, 64, 3)])):
            out = pipe(["x", "y"], image=images, num_inference_steps=1, output_type=output_type).images
            assert [item.size if output_type == "pil" else item.shape for item in out] == sizes


def sigmas_of(pipe, **kwargs) -> list[float]:
    """Noise levels of a call's scheduler."""
    levels = []

    def read(pipeline, step, timestep, tensors):
        levels[:] = pipeline.scheduler.sigmas.tolist()
        return tensors

    pipe("x", callback_on_step_end=read, **(SMALL | kwargs))
    return levels


class TestLoop:
    def test_callback_sees_and_replaces_the_latents(self, pipe):
        steps = []

        def zero(pipeline, step, timestep, tensors):
            steps.append((step, float(timestep), float(pipeline.current_timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

        images = pipe("x", callback_on_step_end=zero, **SMALL).images
        assert [step for step, *_ in steps] == [0, 1, 2]
        assert all(given == current for _, given, current in steps)
        assert images.abs().max() == 0

    def test_callback_may_turn_guidance_off(self, pipe, forwards):
        seen = forwards(pipe)

        def off(pipeline, step, timestep, tensors):
            pipeline._guidance_scale = 1.0
            return tensors

        pipe("x", callback_on_step_end=off, cfg_interval=(0.0, 1.0), **SMALL)
        assert seen.branches == [2, 1, 1]

    def test_interrupt_stops_the_work(self, pipe, forwards):
        seen = forwards(pipe)

        def stop(pipeline, step, timestep, tensors):
            pipeline._interrupt = True
            return tensors

        pipe("x", callback_on_step_end=stop, **SMALL)
        assert len(seen.denoising) == 1

    def test_progress_bar_counts_the_steps(self, own_pipe, capsys):
        own_pipe.set_progress_bar_config(disable=False)
        own_pipe("x", **SMALL)
        assert "3/3" in capsys.readouterr().err
        assert own_pipe.num_timesteps == 3

    def test_sigmas_are_shifted_once(self, pipe):
        assert sigmas_of(pipe, sigmas=[1.0, 0.5]) == pytest.approx([1.0, 0.75, 0.0])

    def test_velocities_reach_the_scheduler_in_float32(self, own_pipe, monkeypatch):
        own_pipe.to(torch.bfloat16)
        seen = []
        step = FlowMatchEulerDiscreteScheduler.step

        def spy(self, velocity, t, latents, **kwargs):
            seen.append((velocity.dtype, latents.dtype))
            return step(self, velocity, t, latents, **kwargs)

        monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", spy)
        own_pipe("x", **(SMALL | {"output_type": "np"}))
        assert set(seen) == {(torch.float32, torch.float32)}


class TestInputs:
    def test_prompt_with_image_equals_messages(self, pipe):
        direct = pipe("make it red", image=golden_image("square"), generator=seeded(1), **EDIT).images
        messages = conversation(["@square", "make it red"])
        assert torch.equal(pipe(messages=messages, generator=seeded(1), **EDIT).images, direct)

    def test_several_images_and_interleaved_messages(self, pipe):
        both = [golden_image("square"), golden_image("wide")]
        direct = pipe("join them", image=both, generator=seeded(1), **EDIT).images
        messages = conversation(["@square", "@wide", "join them"])
        assert torch.equal(pipe(messages=messages, generator=seeded(1), **EDIT).images, direct)
        other = conversation(["@square", "and", "@wide", "join them"])
        assert max_error(pipe(messages=other, generator=seeded(1), **EDIT).images, direct) > 1e-4

    def test_several_turns_with_a_drawn_image(self, pipe):
        drawn = pipe("a red circle", **(SMALL | {"output_type": "pil"})).images[0]
        messages = [
            {"role": "user", "content": "a red circle"},
            {"role": "assistant", "content": [{"type": "image", "image": drawn}]},
            {"role": "user", "content": "now blue"},
        ]
        assert pipe(messages=messages, **EDIT).images.isfinite().all()

    def test_one_image_serves_every_prompt(self, pipe):
        batch = pipe(["a", "b"], image=golden_image("square"), generator=seeded(1, 2), **EDIT).images
        single = pipe("b", image=golden_image("square"), generator=seeded(2), **EDIT).images
        assert max_error(batch[1], single[0]) <= 1e-5

    @pytest.mark.parametrize("size", [(16, 16), (128, 16), (16, 128), (128, 128)])
    def test_sizes_and_ratios(self, pipe, size):
        image = pipe("x", height=size[0], width=size[1], num_inference_steps=1).images[0]
        assert image.size == size[::-1]

    def test_default_size_is_what_the_position_table_allows(self, pipe):
        assert pipe("x", num_inference_steps=1).images[0].size == (128, 128)

    def test_the_message_list_is_left_as_it_was(self, pipe):
        messages = conversation(["@square", "x"])
        before = copy.deepcopy([part["type"] for part in messages[0]["content"]])
        pipe(messages=messages, **EDIT)
        assert [part["type"] for part in messages[0]["content"]] == before


class TestLibrary:
    def test_auto_pipeline_knows_it(self, own_pipe, tmp_path):
        own_pipe.save_pretrained(tmp_path)
        assert isinstance(AutoPipelineForText2Image.from_pretrained(tmp_path), BagelPipeline)

    def test_save_and_load_gives_the_same_image(self, own_pipe, tmp_path):
        own_pipe.save_pretrained(tmp_path)
        loaded = BagelPipeline.from_pretrained(tmp_path)
        assert loaded.scheduler.config.shift == 3.0
        settings = EDIT | {"image": golden_image("tall")}
        images = [each("x", generator=seeded(1), **settings).images for each in (own_pipe, loaded)]
        assert torch.equal(*images)

    def test_flat_layout_serves_both_libraries(self, own_pipe, tmp_path):
        own_pipe.transformer.save_pretrained(tmp_path)
        own_pipe.processor.save_pretrained(tmp_path)
        own_pipe.vae.save_pretrained(tmp_path / "vae")
        own_pipe.scheduler.save_pretrained(tmp_path / "scheduler")
        own_pipe.save_config(tmp_path)
        loaded = BagelPipeline.from_pretrained(tmp_path)
        images = [each("x", generator=seeded(1), **SMALL).images for each in (own_pipe, loaded)]
        assert torch.equal(*images)
        type(own_pipe.transformer).from_pretrained(tmp_path)

    def test_dtype_may_differ_by_component(self):
        pipe = BagelPipeline.from_pretrained(
            CHECKPOINT, dtype={"transformer": torch.bfloat16, "default": torch.float32}
        )
        assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)

    def test_components_are_those_of_the_constructor(self, pipe):
        assert set(pipe.components) == {"transformer", "vae", "scheduler", "processor"}
        again = BagelPipeline(**pipe.components)
        images = [each("x", generator=seeded(1), **SMALL).images for each in (pipe, again)]
        assert torch.equal(*images)

    @pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
    def test_offload_hooks_fire_and_change_nothing(self, own_pipe, mode, monkeypatch):
        # accelerate 1.15 cannot offload any model to "cpu:0", the name that diffusers gives this stand-in for a GPU.
        offload = accelerate.cpu_offload
        monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **kw: offload(model, "cpu", **kw))
        settings = SMALL | {"think": True, "max_think_tokens": 4, "output_type": "pt"}
        plain = own_pipe("x", generator=seeded(1), **settings).images
        getattr(own_pipe, mode)(device="cpu")
        embedding = own_pipe.transformer.get_input_embeddings()
        assert hasattr(own_pipe.transformer if mode == "enable_model_cpu_offload" else embedding, "_hf_hook")
        offloaded = own_pipe("x", generator=seeded(1), **settings).images
        assert torch.equal(plain, offloaded)
        edited = own_pipe("x", image=golden_image("square"), **EDIT).images
        assert edited.isfinite().all()

    def test_vae_tiling_and_slicing(self, own_pipe):
        settings = SMALL | {"output_type": "pt"}
        plain = own_pipe(["x", "y"], generator=seeded(1, 2), **settings).images
        own_pipe.vae.enable_slicing()
        assert max_error(own_pipe(["x", "y"], generator=seeded(1, 2), **settings).images, plain) <= 1e-4
        own_pipe.vae.tile_sample_min_size = 32
        own_pipe.vae.tile_latent_min_size = 4
        own_pipe.vae.enable_tiling()
        tiled = own_pipe(["x", "y"], generator=seeded(1, 2), **settings).images
        assert tiled.shape == plain.shape
        assert max_error(tiled, plain) > 0

    def test_shift_is_the_schedulers(self, own_pipe):
        own_pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own_pipe.scheduler.config, shift=1.0)
        assert sigmas_of(own_pipe, num_inference_steps=2) == [1.0, 0.5, 0.0]


def test_photos_stand_upright(pipe):
    photos, upright = zip(*(phone_photo(orientation) for orientation in range(1, 9)), strict=True)
    lying = [PIL.Image.open(io.BytesIO(content)) for content in photos]
    drawn = [pipe("join", list(images), generator=seeded(0), **EDIT).images for images in (lying, upright)]
    assert torch.equal(*(images[0] for images in drawn))
