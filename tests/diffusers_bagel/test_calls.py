"""What belongs to one call stays in it: threads share a pipeline, and no call leaves anything behind for the next."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffusers_bagel import BagelPipeline, pipeline_bagel
from diffusers_bagel.guidance import EDITING, TEXT_TO_IMAGE
from tests.conftest import conversation, golden_image, load_processor, max_error
from tests.diffusers_bagel.conftest import EDIT, SMALL, encoded, paused, seeded


SAMPLED = {"think": True, "max_think_tokens": 6, "do_sample": True, "temperature": 1.0}


def state_of(scheduler) -> dict:
    """A scheduler's attributes, tensors as lists."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in vars(scheduler).items()
    }


def drawn(pipe: BagelPipeline, **kwargs) -> torch.Tensor:
    return pipe("a red circle", **(SMALL | {"generator": seeded(0)} | kwargs)).images


class TestThreads:
    @pytest.mark.parametrize("scheduler", [None, UniPCMultistepScheduler])
    def test_pictures_of_four_threads_equal_single_runs(self, own_pipe, scheduler):
        if scheduler is not None:
            own_pipe.scheduler = scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)

        def draw(index: int):
            kinds = ({}, {"guidance_scale": 2.0, "num_inference_steps": 5}, SAMPLED)
            out = own_pipe(f"{index} circles", generator=seeded(index), **(SMALL | kinds[index % len(kinds)]))
            return out.images, out.texts

        singles = [draw(index) for index in range(24)]
        state = torch.get_rng_state()
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(draw, range(24)))
        for (image, texts), (expected, expected_texts) in zip(together, singles, strict=True):
            assert texts == expected_texts
            assert torch.equal(image, expected)
        assert torch.equal(torch.get_rng_state(), state)

    def test_sampled_plans_of_threads_equal_those_of_single_runs(self, pipe):
        """`generate` draws from the random state that all threads share."""
        settings = SMALL | SAMPLED | {"max_think_tokens": 24, "num_inference_steps": 1}

        def write(seed: int) -> str:
            return pipe("x", generator=seeded(seed), **settings).texts[0]

        singles = [write(seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(write, range(8))) == singles

    def test_each_thread_keeps_its_own_guidance(self, pipe):
        """A callback of one call turns guidance off, while another call runs."""
        expected = drawn(pipe, cfg_interval=(0.0, 1.0))
        other_started, other_ended = threading.Event(), threading.Event()

        def turn_off(pipeline, step, timestep, tensors):
            pipeline._guidance_scale = 1.0
            other_started.set()
            assert other_ended.wait(60)
            return tensors

        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(drawn, pipe, callback_on_step_end=turn_off, num_inference_steps=2)
            assert other_started.wait(60)
            found = drawn(pipe, cfg_interval=(0.0, 1.0))
            other_ended.set()
            other.result()
        assert torch.equal(found, expected)

    def test_another_thread_stops_the_running_call(self, pipe, forwards):
        seen = forwards(pipe)
        with paused(drawn, pipe):
            pipe._interrupt = True
        assert len(seen.denoising) == 1
        seen.denoising.clear()
        drawn(pipe)
        assert len(seen.denoising) == 3

    def test_a_call_that_begins_in_between_does_not_go_on_for_the_others(self, pipe, forwards):
        seen = forwards(pipe)
        with paused(drawn, pipe):
            pipe._interrupt = True
            drawn(pipe)
            assert len(seen.denoising) == 1 + 3
        assert len(seen.denoising) == 1 + 3


class TestAfterACall:
    def test_the_scheduler_is_as_it_was(self, own_pipe):
        before = state_of(own_pipe.scheduler)
        drawn(own_pipe)
        assert state_of(own_pipe.scheduler) == before
        # One that somebody else has used, too.
        own_pipe.scheduler.set_timesteps(7)
        before = state_of(own_pipe.scheduler)
        drawn(own_pipe, sigmas=[1.0, 0.5])
        assert state_of(own_pipe.scheduler) == before

    @pytest.mark.parametrize("think", [False, True])
    def test_an_exception_leaves_nothing_behind(self, own_pipe, think):
        expected = drawn(own_pipe)
        own_pipe.enable_taylorseer(interval=2, warmup_steps=1)
        predicted = drawn(own_pipe, num_inference_steps=8)

        def fail(pipeline, step, timestep, tensors):
            pipeline._guidance_scale = 1.0
            tensors["latents"].zero_()
            if step == 1:
                raise RuntimeError("the caller's own")
            return tensors

        settings = {"think": think, "max_think_tokens": 6, "num_inference_steps": 8}
        with pytest.raises(RuntimeError, match="the caller's own"):
            drawn(own_pipe, callback_on_step_end=fail, guidance_scale=7.0, attention_kwargs={}, **settings)
        assert torch.equal(drawn(own_pipe, num_inference_steps=8), predicted)
        own_pipe.disable_taylorseer()
        assert torch.equal(drawn(own_pipe), expected)

    def test_an_exception_of_an_offloaded_pipeline_puts_its_models_back(self, own_pipe):
        own_pipe.enable_model_cpu_offload(device="cpu")
        expected = drawn(own_pipe)

        def fail(pipeline, step, timestep, tensors):
            raise RuntimeError("the caller's own")

        with pytest.raises(RuntimeError, match="the caller's own"):
            drawn(own_pipe, callback_on_step_end=fail)
        assert torch.equal(drawn(own_pipe), expected)

    def test_an_interrupted_call_leaves_nothing_behind(self, pipe, own_pipe):
        def stop(pipeline, step, timestep, tensors):
            pipeline._interrupt = True
            return tensors

        stopped = drawn(own_pipe, callback_on_step_end=stop)
        found = drawn(own_pipe)
        assert torch.equal(found, drawn(pipe))
        assert max_error(stopped, found) > 1e-3

    def test_what_the_last_call_used_can_be_read(self, own_pipe):
        assert (own_pipe.guidance_scale, own_pipe.do_classifier_free_guidance) == (1.0, False)
        drawn(own_pipe, guidance_scale=3.0)
        assert (own_pipe.guidance_scale, own_pipe.do_classifier_free_guidance, own_pipe.num_timesteps) == (
            3.0,
            True,
            3,
        )


class TestGenerators:
    def test_the_same_generator_gives_other_plans_and_other_noise_each_time(self, pipe):
        generator = seeded(1)
        first, second = (pipe("x", generator=generator, **SMALL, **SAMPLED) for _ in range(2))
        assert first.texts != second.texts
        assert max_error(first.images, second.images) > 1e-2

    def test_two_prompts_of_one_generator_have_plans_of_their_own(self, pipe):
        texts = pipe(["x", "x"], generator=seeded(1), **SMALL, **SAMPLED).texts
        assert texts[0] != texts[1]

    def test_greedy_plans_take_nothing_from_the_generator(self, pipe):
        plain, thinking = seeded(1), seeded(1)
        pipe("x", generator=plain, **SMALL)
        pipe("x", generator=thinking, think=True, max_think_tokens=4, **SMALL)
        assert torch.equal(plain.get_state(), thinking.get_state())

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_noise_is_asked_for_on_the_generators_own_device(self, pipe, device, monkeypatch):
        class Elsewhere:
            def __init__(self):
                self.device = torch.device(device)

        asked = []

        def randn(shape, generator=None, device=None, dtype=None, layout=None):
            asked.append((generator.device, device, dtype))
            return torch.ones(shape, dtype=dtype)

        monkeypatch.setattr(pipeline_bagel, "randn_tensor", randn)
        noise = pipe.prepare_latents([(2, 2)], [Elsewhere()])
        assert asked == [(torch.device(device), torch.device(device), torch.float32)]
        assert (noise == 1).all() and noise.shape == (1, 4, 16)


class TestTrainMode:
    @pytest.mark.parametrize("think", [False, True])
    @pytest.mark.parametrize("edits", [False, True])
    def test_a_transformer_left_in_training_draws_as_in_eval_mode(self, own_pipe, edits, think):
        task = (EDIT | {"image": golden_image("square")}) if edits else SMALL
        settings = task | {"think": think, "max_think_tokens": 6}
        expected = own_pipe("a red circle", generator=seeded(0), **settings)
        own_pipe.transformer.train()
        own_pipe.transformer.activation_checkpointing_enable()
        found = own_pipe("a red circle", generator=seeded(0), **settings)
        assert found.texts == expected.texts
        assert max_error(found.images, expected.images) <= 1e-5
        assert own_pipe.transformer.training


class TestParts:
    """Every public method works on a pipeline that was never called."""

    @pytest.fixture
    def fresh(self, pipe) -> BagelPipeline:
        return BagelPipeline(**pipe.components)

    def test_the_parts_together_are_a_call(self, fresh, pipe):
        prompt = encoded(fresh, conversation(["@square", "now blue"]), think=True)
        contexts, plans = fresh.prepare_contexts([prompt], [EDITING], think=True, max_think_tokens=4)
        assert set(contexts[0]) == {"full", "no_text", "no_image"}
        out = pipe(
            "now blue",
            image=golden_image("square"),
            think=True,
            max_think_tokens=4,
            vae_sample_mode="argmax",
            **(EDIT | {"num_inference_steps": 1}),
        )
        assert plans == out.texts

    def test_contexts_of_a_sampled_plan_need_no_generator(self, fresh):
        prompt = fresh.encode_conversation(conversation(["x"]), think=True)
        _, plans = fresh.prepare_contexts([prompt], [TEXT_TO_IMAGE], **SAMPLED)
        assert len(plans) == 1 and isinstance(plans[0], str)

    def test_encoding_and_decoding(self, fresh):
        latents = fresh.encode_image(torch.zeros(3, 48, 64), vae_sample_mode="argmax")
        assert latents.shape == (12, 16) and latents.dtype == torch.float32
        assert fresh.decode_latents(latents[None], (3, 4), "pt").shape == (1, 3, 48, 64)
        assert fresh.decode_latents(latents[None], (3, 4))[0].size == (64, 48)

    def test_noise_of_several_sizes(self, fresh):
        noise = fresh.prepare_latents([(2, 2), (1, 3)], [seeded(0), None])
        assert noise.shape == (2, 4, 16)
        assert torch.equal(noise[0], torch.randn(4, 16, generator=seeded(0)))
        assert noise[1, 3:].abs().max() == 0

    def test_inputs_are_checked(self, fresh):
        fresh.check_inputs("x")
        with pytest.raises(ValueError, match="`height`"):
            fresh.check_inputs("x", height=7)

    def test_an_image_beyond_the_position_table_is_refused_by_the_conversations_own_method(self, fresh):
        processor = load_processor(vae_size={"longest_edge": 1024, "shortest_edge": 512})
        other = BagelPipeline(**(fresh.components | {"processor": processor}))
        with pytest.raises(ValueError, match="position table"):
            other.encode_conversation(conversation(["@square", "x"]))


def test_a_custom_chat_template_changes_no_picture(pipe):
    processor = load_processor(chat_template="{% for message in messages %}{{ 'changed' }}{% endfor %}")
    assert processor.apply_chat_template(conversation(["x"])) == "changed"
    other = BagelPipeline(**(pipe.components | {"processor": processor}))
    other.set_progress_bar_config(disable=True)
    settings = SMALL | {"think": True, "max_think_tokens": 4}
    found, expected = (each("x", generator=seeded(0), **settings) for each in (other, pipe))
    assert torch.equal(found.images, expected.images)
    assert found.texts == expected.texts


class TestVAE:
    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    @pytest.mark.parametrize("images", [None, [["wide"], ["tall"]]], ids=["one size", "two sizes"])
    def test_nan_behind_the_vae_is_an_error(self, own_pipe, output_type, images):
        with torch.no_grad():
            own_pipe.vae.decoder.conv_out.bias[0] = float("nan")
        if images is not None:
            images = [[golden_image(name) for name in names] for names in images]
        with pytest.raises(ValueError, match=r"VAE.*NaN"):
            own_pipe(["x", "y"], image=images, num_inference_steps=1, output_type=output_type)

    def test_a_float16_vae_that_would_overflow_draws(self, own_pipe):
        assert own_pipe.vae.config.force_upcast
        with torch.no_grad():
            # What follows is normalised, so that float32 knows no difference.
            own_pipe.vae.decoder.conv_in.weight.mul_(20000)
            own_pipe.vae.decoder.conv_in.bias.mul_(20000)
        own_pipe.vae.to(torch.float16)
        halved = copy.deepcopy(own_pipe.vae)
        expected = drawn(
            BagelPipeline(**(own_pipe.components | {"vae": copy.deepcopy(halved).float()})), output_type="pt"
        )
        latents = torch.randn(1, 4, 6, 8, generator=seeded(0)).half()
        assert not halved.decode(latents).sample.isfinite().all()
        assert torch.equal(drawn(own_pipe, output_type="pt"), expected)
